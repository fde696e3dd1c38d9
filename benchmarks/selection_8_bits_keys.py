"""The blocks that int8 scores leave to score again: `python -m benchmarks.selection_8_bits_keys`.

The models are that of `python -m flexmsa demo`, the same with more index dims, without RoPE and without norms, and that
of `python -m flexmsa convert-demo` after its first phase, all trained as the demos train them. They read held-out text
longer than they were trained for, and the last tokens of it select, by the block size and topk of large models. Writes
benchmarks/results/selection_8_bits.json.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexmsa
from benchmarks.selection_8_bits import measure
from flexmsa import MSAConfig
from flexmsa._progress import Progress
from flexmsa.demo.model import GPT, language_loss
from flexmsa.demo.text import Text, random_batch, read_standard_library
from flexmsa.demo.train import Settings, learning_rate
from flexmsa.integrations.transformers.convert import convert, set_warm_up
from flexmsa.integrations.transformers.demo.train import Demo
from flexmsa.integrations.transformers.demo.train import Settings as ConvertSettings

BLOCK, TOPK, QUERIES = 128, 16, 128
LENGTHS = (32768, 131072)
RESULTS = Path(__file__).parent / "results" / "selection_8_bits.json"
MODELS: dict[str, dict] = {
    "demo, Di 32": {},
    "demo, Di 128": {"index_head_dim": 128},
    "demo, Di 128, no RoPE": {"index_head_dim": 128, "rotary_dim": 0},
    "demo, Di 128, no norms": {"index_head_dim": 128, "qk_norm": False},
    "demo, Di 128, neither": {"index_head_dim": 128, "qk_norm": False, "rotary_dim": 0},
}


def train(model: GPT, text: Text, demo: Settings, steps: int) -> None:
    """As the demo trains it, without the dense twin."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.learning_rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(demo.seed)
    for step in range(1, steps + 1):
        model.set_topk(demo.topk if step > demo.warmup * steps // demo.steps else None)
        ids = random_batch(text.train, demo.batch_size, demo.context + 1, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, demo.learning_rate)
        logits, index_loss = model(ids[:, :-1])
        optimizer.zero_grad()
        (language_loss(logits, ids[:, 1:]) + index_loss).backward()
        for chosen in (True, False):
            own = [x for name, x in model.named_parameters() if (".index_" in name) == chosen]
            torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()


@torch.no_grad()
def index_branches(model: GPT, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(index_q [G, QUERIES, Di], index_k [S, Di]) in bf16 of each layer, on the bytes ids [1, S]."""
    model.eval()
    x = model.embedding(ids)
    for block in model.blocks:
        _, _, _, index_q, index_k = block.attention.project(block.attention_norm(x))
        yield index_q[0, :, -QUERIES:].bfloat16(), index_k[0, 0].bfloat16()
        x, _ = block(x)


@torch.no_grad()
def converted_branches(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """As `index_branches`, of a converted model."""
    found = []

    def select(index_q: Tensor, index_k: Tensor, config: MSAConfig) -> Tensor:
        found.append((index_q[0, :, -QUERIES:].bfloat16(), index_k[0, 0].bfloat16()))
        return flexmsa.select_blocks(index_q, index_k, block_size=config.block_size, topk=config.topk)

    set_warm_up(model, False)
    model.flexmsa.select = select
    model.eval()
    model.model(ids)
    return found


def drawn(seqlen: int, size: int = 128) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Keys of distributions: normal numbers; a low rank with large channels and equal norms; topics."""
    torch.manual_seed(0)
    normal = torch.randn
    yield "normal", normal(1, QUERIES, size), normal(seqlen, size)
    basis = normal(size, size) * torch.logspace(0, -1.5, size)[:, None]
    k, q = normal(seqlen, size) @ basis + 0.05 * normal(seqlen, size), normal(1, QUERIES, size) @ basis
    k[:, :3] *= 6
    yield "low rank, large channels", *(x / x.norm(dim=-1, keepdim=True) * math.sqrt(size) for x in (q, k))
    topics = normal(512, size)
    k = topics[torch.randint(512, (seqlen,))] * 0.7 + normal(seqlen, size)
    yield "topics", topics[torch.randint(512, (1, QUERIES))] + 0.5 * normal(1, QUERIES, size), k
    k = k * torch.exp(normal(seqlen, 1))
    yield "topics, norms of any size", topics[torch.randint(512, (1, QUERIES))] + 0.5 * normal(1, QUERIES, size), k


def report(name: str, seqlen: int, found: list[dict]) -> list[dict]:
    """Print rows of `measure`, and return them with the name of their keys."""
    for row in found:
        counts = ", ".join(f"{key} {row[key]['mean']:.1f} / {row[key]['99 %']:.0f}" for key in ("candidates", "again"))
        shares = ", ".join(f"{key} {row[key]:.1%}" for key in ("certified by 32", "certified by 64", "certified"))
        print(
            f"{name}, {seqlen}, scale per {row['scale per']}: {counts}, {shares}, "
            f"int8 alone {row['ids that differ in int8 alone']:.1%}",
            flush=True,
        )
    return [{"keys": name, "seqlen": seqlen, **row} for row in found]


def load_or_train(name: str, change: dict, text: Text, demo: Settings, options: argparse.Namespace) -> GPT:
    """The model of this name, read from the folder of models if it is there, else trained, and written there."""
    torch.manual_seed(demo.seed)
    model = GPT(dataclasses.replace(demo.attention(), **change), demo.num_layers)
    path = options.models and options.models / f"{name.replace(', ', '_').replace(' ', '_')}.pt"
    if path and path.exists():
        model.load_state_dict(torch.load(path))
    else:
        train(model, text, demo, options.steps)
        if path:
            torch.save(model.state_dict(), path)
    model.set_topk(demo.topk)
    return model


def load_or_convert(text: Text, options: argparse.Namespace) -> Any:
    """The converted model, read or trained as in `load_or_train`."""
    demo = Demo(ConvertSettings(dense_steps=options.dense_steps), text)
    path = options.models and options.models / "converted.pt"
    if path and path.exists():
        convert(demo.dense, {"block_size": demo.settings.block_size, "topk": demo.settings.topk})
        demo.dense.load_state_dict(torch.load(path))
        return demo.dense
    demo.train_dense(Progress(demo.settings.dense_steps))
    demo.warm_up(Progress(demo.settings.warm_up_steps))
    if path:
        torch.save(demo.converted.state_dict(), path)
    return demo.converted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection_8_bits_keys", description=__doc__)
    demo = Settings()
    parser.add_argument("--steps", type=int, default=demo.steps, help="training steps of each model")
    parser.add_argument(
        "--dense-steps", type=int, default=ConvertSettings().dense_steps, help="those before a conversion"
    )
    parser.add_argument("--length", type=int, default=LENGTHS[0], help="bytes that the models read")
    parser.add_argument("--models", type=Path, help="folder to keep the trained models in")
    options = parser.parse_args(argv)
    rows: list[dict] = []
    for seqlen in LENGTHS:
        for name, q, k in drawn(seqlen):
            rows += report(name, seqlen, measure(q.bfloat16(), k.bfloat16(), BLOCK, TOPK))
    text = read_standard_library()
    ids = text.validation[: options.length].long()[None]
    for name, change in MODELS.items():
        model = load_or_train(name, change, text, demo, options)
        for layer, (q, k) in enumerate(index_branches(model, ids)):
            rows += report(f"{name}, layer {layer}", options.length, measure(q, k, BLOCK, TOPK))
    for layer, (q, k) in enumerate(converted_branches(load_or_convert(text, options), ids)):
        rows += report(f"converted, layer {layer}", options.length, measure(q, k, BLOCK, TOPK))
    RESULTS.write_text(json.dumps({"steps": options.steps, "queries": QUERIES, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
