"""Compile the kernels that matter for speed, for GPUs that need not be present, and note what the compiler says.

    python -m benchmarks.kernels [--targets sm_90 ...] [--out benchmarks/results/kernels.json]

The launches are those of a user's call at MiniMax-M3's shape, recorded on meta tensors: 64 query heads, 4 KV heads,
head dim and index head dim 128, blocks of 128 keys, topk 16, bf16. Prints a table and writes it, with the FLOPs per
byte of each kernel and of an H200 (`ridge`): a kernel above the ridge is bound by its products, one below by memory.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from flexmsa.kernels.triton.common.launch import Launch, compile_key
from flexmsa.kernels.triton.common.target import Target
from flexmsa.kernels.triton.selection.config import CERTIFIED_KEYS
from flexmsa.testing import launches
from flexmsa.testing.compiled import report
from flexmsa.testing.launches import TARGETS, CacheFormat, Layer

RESULT = Path(__file__).resolve().parent / "results" / "kernels.json"
# An 8192^3 bf16 product and a device copy, as measured on an H200.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 783e12, 4.25e12
ELEMENT = 2  # bytes of a bf16 number

Costs = dict[str, tuple[float, float]]  # FLOPs and bytes of each kernel


def entries(layer: Layer) -> int:
    """(token, group, top-k slot): one for each chosen block."""
    return layer.tokens * layer.num_kv_heads * layer.topk


def rows(layer: Layer) -> int:
    """Heads of all entries."""
    return entries(layer) * layer.group_size


def outputs(layer: Layer) -> int:
    """Bytes of q, out or grad_q."""
    return layer.tokens * layer.num_heads * layer.head_dim * ELEMENT


def selection_costs(layer: Layer) -> Costs:
    """Causal scores; queries and keys read once, ids written."""
    flops = layer.num_kv_heads * layer.index_head_dim * float(layer.tokens) ** 2
    vectors = layer.tokens * (layer.num_kv_heads + 1) * layer.index_head_dim * ELEMENT
    return {"selection": (flops, vectors + 4.0 * entries(layer))}


def forward_costs(layer: Layer, tile_tokens: int = 8, union: int = 18) -> Costs:
    """Query-major: `union` blocks per tile of `tile_tokens` tokens; keys come from memory once, and from L2 otherwise.

    Key-major: queries read and partial results written, each with its lse, then read again and added up.
    """
    product = 4.0 * layer.block_size * layer.head_dim
    scored = layer.tokens // tile_tokens * layer.num_kv_heads * union * tile_tokens * layer.group_size
    keys = 2 * layer.tokens * layer.num_kv_heads * layer.head_dim * ELEMENT
    row = layer.head_dim * ELEMENT
    return {
        "forward: query_major": (scored * product, 2.0 * outputs(layer) + keys),
        "forward: key_major": (rows(layer) * product, rows(layer) * (2.0 * row + 4)),
        "forward: combine": (2.0 * rows(layer) * layer.head_dim, rows(layer) * (row + 4.0) + outputs(layer)),
    }


def backward_costs(layer: Layer) -> Costs:
    """Five products, q and dO gathered and a share of dQ written for each row; then the shares read and added up."""
    row = layer.head_dim * ELEMENT
    return {
        "backward: gradient": (10.0 * rows(layer) * layer.block_size * layer.head_dim, 3.0 * rows(layer) * row),
        "backward: sum_slots": (1.0 * rows(layer) * layer.head_dim, 1.0 * rows(layer) * row + outputs(layer)),
    }


def loss_costs(layer: Layer) -> Costs:
    """The student's scores, an lse for each entry; the teacher's products and the student's three, q and index_q
    gathered and an fp32 share of grad_index_q written; then the shares read and added up.
    """
    teacher = 2.0 * layer.group_size * layer.head_dim * layer.block_size * entries(layer)
    student = 2.0 * layer.index_head_dim * layer.block_size * entries(layer)
    query, share = layer.index_head_dim * ELEMENT, 4.0 * layer.index_head_dim
    gathered = layer.group_size * layer.head_dim * ELEMENT + query
    sums = entries(layer) + layer.tokens * layer.num_kv_heads
    return {
        "loss: block_lse": (student, entries(layer) * (query + 4.0)),
        "loss: index_loss": (teacher + 3 * student, entries(layer) * (gathered + share)),
        "loss: sum_slots": (1.0 * entries(layer) * layer.index_head_dim, sums * share),
    }


def serving_costs(layer: Layer) -> Costs:
    """One token against `tokens` keys: index keys, read for all groups at once; the keys and values of its blocks, read
    for all heads of a group; its own vectors, read and written. The second of each pair reads e4m3 numbers and scales.
    """
    keys = layer.topk * layer.block_size * layer.num_kv_heads
    score = 2.0 * layer.num_kv_heads * layer.index_head_dim * layer.tokens
    attend = 4.0 * layer.num_heads * layer.topk * layer.block_size * layer.head_dim
    new = 2 * layer.num_kv_heads * layer.head_dim + layer.index_head_dim
    scales = 2.0 * layer.num_kv_heads + 1
    return {
        "decode: selection": (score, 1.0 * layer.tokens * layer.index_head_dim * ELEMENT),
        "decode: selection, e4m3": (score, layer.tokens * (layer.index_head_dim + 1.0)),
        "decode: attend": (attend, 2.0 * keys * layer.head_dim * ELEMENT),
        "decode: attend, e4m3": (attend, 2.0 * keys * (layer.head_dim + 1)),
        "decode: append": (1.0 * new, 2.0 * new * ELEMENT),
        "decode: append, e4m3": (3.0 * new, new * (ELEMENT + 1) + scales),
    }


def flops_per_byte(layer: Layer) -> dict[str, float]:
    """Of every kernel, after the cost formulas in the docstrings of its module."""
    every = (selection_costs, forward_costs, backward_costs, loss_costs, serving_costs)
    costs = {label: cost for costs_of in every for label, cost in costs_of(layer).items()}
    return {label: round(flops / size, 2) for label, (flops, size) in costs.items()}


def launches_of(layer: Layer, target: Target) -> Iterator[tuple[str, Launch]]:
    """Each launch of a training step and of two decoding steps, with its label: the task and the kernel's name."""
    # Shorter, as another kernel than the one of the table selects where there are more keys.
    shorter = replace(layer, tokens=CERTIFIED_KEYS)
    yield from labelled("selection", launches.selection_launches(shorter, target))
    yield from labelled("forward", launches.forward_launches(layer, target))
    yield from labelled("backward", launches.backward_launches(layer, target))
    yield from labelled("loss", launches.loss_launches(layer, target))
    yield from labelled("decode", launches.decode_launches(layer, target))
    e4m3 = CacheFormat(paged=True, scaled=True, index_dtype=torch.float8_e4m3fn)
    yield from labelled("decode", launches.decode_launches(layer, target, e4m3), ", e4m3")


def labelled(task: str, found: list[Launch], suffix: str = "") -> Iterator[tuple[str, Launch]]:
    """The launches with labels; an implementation for one architecture has the label of the kernel it replaces."""
    for launch in found:
        name = launch.kernel.__name__.removesuffix("_kernel").removesuffix("_sm90")
        yield (task if name == task else f"{task}: {name}") + suffix, launch


def compile_all(name: str, layer: Layer) -> Iterator[dict[str, Any]]:
    """A row for each kernel with a cost formula, built for the target of that name."""
    # Several token ranges launch the same kernel.
    distinct = {compile_key(launch): (label, launch) for label, launch in launches_of(layer, TARGETS[name])}
    for label, launch in distinct.values():
        if label in flops_per_byte(layer):
            found = report(launch.compile(TARGETS[name]))
            numbers = {"registers": found.registers, "shared": found.shared, "spills": found.spilled}
            yield {"kernel": label, "target": name, **numbers, "wgmma": found.wgmma}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default: the committed results)")
    options = parser.parse_args(argv)
    layer = Layer()
    table = []
    print(f"{'kernel':<27} {'target':<7} registers  shared  spills  wgmma")
    for name in options.targets:
        for row in compile_all(name, layer):
            table.append(row)
            numbers = f"{row['registers']:>9}  {row['shared']:>6}  {row['spills']:>6}"
            print(f"{row['kernel']:<27} {name:<7} {numbers}  {'yes' if row['wgmma'] else 'no'}", flush=True)
    ridge = round(FLOPS_PER_SECOND / BYTES_PER_SECOND, 1)
    result = {"triton": triton.__version__, "ridge": ridge, "flops_per_byte": flops_per_byte(layer), "rows": table}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
