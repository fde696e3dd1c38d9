"""Small checkpoints, converted and not, and what transformers generates from them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flexmsa.integrations.transformers import convert, set_warm_up

VOCABULARY = 512
# That each prompt is continued with.
TOKENS = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
# Layer 0 stays dense.
LAYERS = [1, 2]
SETTINGS = ("block_size", "index_head_dim", "qk_norm", "bias", "num_init_blocks")


def save(folder: Path, family: str = "qwen3", *, warm_up: bool | None = False, layers=LAYERS, **sizes) -> Path:
    """Save a random model with a tokenizer; with warm_up None it is not converted. Return the folder."""
    config, model_class, own = FAMILIES[family]
    torch.manual_seed(0)
    settings = {name: sizes.pop(name) for name in SETTINGS if name in sizes}
    model = model_class(config(**{**SIZES, **own, **sizes})).eval()
    _sharpen(model, "")
    if warm_up is not None:
        convert(model, {"topk": 2, **settings}, layers=layers)
        _sharpen(model, "index_")
        set_warm_up(model, warm_up)
    model.save_pretrained(folder)
    words = {f"<{token}>": token for token in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<0>", "eos_token": "<1>", "pad_token": "<2>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def _sharpen(model: torch.nn.Module, part: str) -> None:
    """Enlarge random weights, so that attention and next tokens are not nearly uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and parameter.dim() > 1:
                parameter.mul_(6.0)


def prompts() -> list[list[int]]:
    """Prompts of several lengths; the last shares 520 tokens with the first."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (700, 57, 1029, 256, 390)]
    return [*made, made[0][:520] + made[1]]


@torch.no_grad()
def generate(folder: Path, given: list[list[int]], *, warm_up: bool | None = None) -> list[list[int]]:
    """Return what transformers generates greedily for each prompt; `warm_up` replaces the checkpoint's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if warm_up is not None:
        set_warm_up(model, warm_up)
    model.generation_config.eos_token_id = None
    found = []
    for prompt in given:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False)
        found.append(ids[0, len(prompt) :].tolist())
    return found
