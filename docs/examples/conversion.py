"""Convert a dense transformers model to MSA, train both phases, save and load: `python docs/examples/conversion.py`.

Needs `pip install flexmsa[transformers]`. A model with random weights stands for yours; docs/conversion.md measures a
real conversion.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flexmsa.integrations.transformers import (
    begin_sparse,
    begin_warm_up,
    check_optimizer,
    clip_gradients,
    convert,
    log_entries,
    parameter_groups,
)

CONFIG = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    bos_token_id=None,
    eos_token_id=None,
)


def train(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, steps: int) -> None:
    check_optimizer(model, optimizer)
    for _ in range(steps):
        ids = torch.randint(128, (2, 256))
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        clip_gradients(model, max_norm=1.0)
        optimizer.step()
    entries = log_entries(model)
    print({name: round(value, 3) for name, value in entries.items() if "layer" not in name})


def main() -> None:
    torch.manual_seed(0)
    model = convert(Qwen3ForCausalLM(CONFIG), {"block_size": 16, "topk": 4}).train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    model.flexmsa.with_health = True
    begin_warm_up(model)
    train(model, optimizer, steps=5)
    begin_sparse(model)
    train(model, optimizer, steps=5)

    ids = torch.randint(128, (1, 200))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
        text = loaded.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("generated:", text[0, 200:].tolist())


if __name__ == "__main__":
    main()
