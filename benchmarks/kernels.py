"""Compile the kernels that matter for speed, for GPUs that need not be present, and note what the compiler says.

    python -m benchmarks.kernels [--targets sm_90 ...] [--out benchmarks/results/kernels.json]

Every kernel is built as its launcher would launch it at M3's shape: 64 query heads, 4 KV heads, head dim and index head
dim 128, blocks of 128 keys, topk 16, bf16. Prints a table, and writes it with the FLOPs per byte of each kernel and
of an H200 (`ridge`): a kernel with more is bound by its products, one with fewer by memory.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from flexmsa.kernels.triton.backward import config as backward_config
from flexmsa.kernels.triton.backward import gradient as backward_gradient
from flexmsa.kernels.triton.backward import gradient_sm90 as backward_hopper
from flexmsa.kernels.triton.backward import reduce as backward_sums
from flexmsa.kernels.triton.common import target as targets
from flexmsa.kernels.triton.forward import combine as combine_slots
from flexmsa.kernels.triton.forward import config as forward_config
from flexmsa.kernels.triton.forward import key_major as by_block
from flexmsa.kernels.triton.forward import key_major_sm90 as by_block_hopper
from flexmsa.kernels.triton.forward import query_major as walk
from flexmsa.kernels.triton.forward import query_major_sm90 as walk_hopper
from flexmsa.kernels.triton.loss import config as loss_config
from flexmsa.kernels.triton.loss.gradient import index_loss_kernel, loss_constants
from flexmsa.kernels.triton.loss.reduce import sum_slots_kernel
from flexmsa.kernels.triton.loss.student import block_lse_kernel, lse_constants
from flexmsa.kernels.triton.selection import config as selection_configs
from flexmsa.kernels.triton.selection import kernel_sm90 as scoring_hopper
from flexmsa.kernels.triton.selection import launch as selection
from flexmsa.kernels.triton.serving import config as serving_config
from flexmsa.kernels.triton.serving.attend import attend_constants, attend_kernel
from flexmsa.testing.compiled import TARGETS, box_types, build, report

RESULT = Path(__file__).resolve().parent / "results" / "kernels.json"
# An 8192^3 bf16 product and a device copy, as measured on an H200.
FLOPS_PER_SECOND, BYTES_PER_SECOND = 783e12, 4.25e12


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention layer; `element` is the bytes of a number of q, k, v and the index."""

    tokens: int = 131072
    num_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    index_head_dim: int = 128
    block_size: int = 128
    topk: int = 16
    element: int = 2

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def entries(self) -> int:
        """(token, group, slot) of the chosen blocks."""
        return self.tokens * self.num_kv_heads * self.topk

    @property
    def rows(self) -> int:
        """Heads of all entries."""
        return self.entries * self.group_size

    @property
    def outputs(self) -> int:
        """Bytes of q, out or grad_q."""
        return self.tokens * self.num_heads * self.head_dim * self.element


Costs = dict[str, tuple[float, float]]  # FLOPs and bytes of each kernel
Launch = tuple[str, Any, dict[str, Any], dict[str, int], dict[str, str]]


def selection_costs(shape: Shape) -> Costs:
    """Causal scores; queries and keys read once, ids written."""
    flops = shape.num_kv_heads * shape.index_head_dim * float(shape.tokens) ** 2
    vectors = shape.tokens * (shape.num_kv_heads + 1) * shape.index_head_dim * shape.element
    return {"selection": (flops, vectors + 4.0 * shape.entries)}


def forward_costs(shape: Shape, tile_tokens: int = 8, union: int = 18) -> Costs:
    """Walks of `union` blocks by `tile_tokens` tokens, whose keys memory sees once and L2 the other times; or by block:
    rows read and partial results written, each with its lse, then read again and added up.
    """
    product = 4.0 * shape.block_size * shape.head_dim
    walked = shape.tokens // tile_tokens * shape.num_kv_heads * union * tile_tokens * shape.group_size
    keys = 2 * shape.tokens * shape.num_kv_heads * shape.head_dim * shape.element
    row = shape.head_dim * shape.element
    return {
        "forward: walk": (walked * product, 2.0 * shape.outputs + keys),
        "forward: partial_attention": (shape.rows * product, shape.rows * (2.0 * row + 4)),
        "forward: combine_slots": (2.0 * shape.rows * shape.head_dim, shape.rows * (row + 4.0) + shape.outputs),
    }


def backward_costs(shape: Shape) -> Costs:
    """Five products, q and dO gathered and a share of dQ written for each row; then the shares read and added up."""
    row = shape.head_dim * shape.element
    return {
        "backward: gradient": (10.0 * shape.rows * shape.block_size * shape.head_dim, 3.0 * shape.rows * row),
        "backward: sum_slots": (1.0 * shape.rows * shape.head_dim, 1.0 * shape.rows * row + shape.outputs),
    }


def loss_costs(shape: Shape) -> Costs:
    """The student's scores, an lse for each entry; the teacher's products and the student's three, q and index_q
    gathered and an fp32 share of grad_index_q written; then the shares read and added up.
    """
    teacher = 2.0 * shape.group_size * shape.head_dim * shape.block_size * shape.entries
    student = 2.0 * shape.index_head_dim * shape.block_size * shape.entries
    query, share = shape.index_head_dim * shape.element, 4.0 * shape.index_head_dim
    gathered = shape.group_size * shape.head_dim * shape.element + query
    sums = shape.entries + shape.tokens * shape.num_kv_heads
    return {
        "loss: block_lse": (student, shape.entries * (query + 4.0)),
        "loss: index_loss": (teacher + 3 * student, shape.entries * (gathered + share)),
        "loss: sum_slots": (1.0 * shape.entries * shape.index_head_dim, sums * share),
    }


def serving_costs(shape: Shape) -> Costs:
    """One token against `tokens` keys: index keys, read for all groups at once; the keys and values of its blocks, read
    for all heads of a group; its own vectors, read and written. The second of each pair reads e4m3 numbers and scales.
    """
    keys = shape.topk * shape.block_size * shape.num_kv_heads
    score = 2.0 * shape.num_kv_heads * shape.index_head_dim * shape.tokens
    attend = 4.0 * shape.num_heads * shape.topk * shape.block_size * shape.head_dim
    new = 2 * shape.num_kv_heads * shape.head_dim + shape.index_head_dim
    scales = 2.0 * shape.num_kv_heads + 1
    return {
        "decode: select": (score, 1.0 * shape.tokens * shape.index_head_dim * shape.element),
        "decode: select, e4m3": (score, shape.tokens * (shape.index_head_dim + 1.0)),
        "decode: attend": (attend, 2.0 * keys * shape.head_dim * shape.element),
        "decode: attend, e4m3": (attend, 2.0 * keys * (shape.head_dim + 1)),
        "decode: append": (1.0 * new, 2.0 * new * shape.element),
        "decode: append, e4m3": (3.0 * new, new * (shape.element + 1) + scales),
    }


def flops_per_byte(shape: Shape) -> dict[str, float]:
    """Of every kernel, after the cost formulas in the docstrings of its module."""
    every = (selection_costs, forward_costs, backward_costs, loss_costs, serving_costs)
    costs = {label: cost for costs_of in every for label, cost in costs_of(shape).items()}
    return {label: round(flops / size, 2) for label, (flops, size) in costs.items()}


def pointers(kind: str, names: str) -> dict[str, str]:
    """The type of pointers to `kind` for each name."""
    return {f"{name}_ptr": f"*{kind}" for name in names.split()}


LISTS = pointers("i64", "entries offsets")


def selection_tiles(
    target: targets.Target, shape: Shape, seqlen_q: int, scaled: bool
) -> selection_configs.SelectionConfig:
    """The configuration of the selection for `seqlen_q` queries."""
    return selection_configs.selection_config(
        target,
        num_sequences=1,
        num_kv_heads=shape.num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=shape.tokens,
        index_head_dim=shape.index_head_dim,
        block_size=shape.block_size,
        topk=shape.topk,
        dtype=torch.bfloat16,
        key_size=1 if scaled else shape.element,
        tma_ready=True,
    )


def selection_launch(
    label: str, target: targets.Target, shape: Shape, seqlen_q: int, paged: bool, scaled: bool
) -> Launch:
    """What `selection.rank_blocks` launches for `seqlen_q` queries."""
    groups, depth, block, topk = shape.num_kv_heads, shape.index_head_dim, shape.block_size, shape.topk
    config = selection_tiles(target, shape, seqlen_q, scaled)
    storage = targets.storage_constants(target, paged, scaled)
    options = targets.launch_options(config.num_warps, config.num_stages, None)
    types = pointers("i64", "lists") if config.num_splits > 1 else {}
    if config.hopper:
        constants = scoring_hopper.scorer_constants(config, groups, depth, block, topk, False)
        vectors = torch.float8_e4m3fn if scaled else torch.bfloat16
        types |= box_types(scoring_hopper.scorer_boxes(depth, block), vectors)
        if not scaled:
            types["scale_tiles"] = "i32"
        return label, scoring_hopper.selection_hopper_kernel, constants | storage, options, types
    constants = selection.selection_constants(config, groups, depth, block, topk, False)
    element = "fp8e4nv" if config.fp8_product else "u8" if scaled else "bf16"
    types["index_k"] = f"tensordesc<{element}[1,{block},{depth}]>" if config.use_tma else f"*{element}"
    return label, selection.selection_kernel, constants | storage, options, types


def selection_launches(target: targets.Target, shape: Shape) -> Iterator[Launch]:
    """What `selection.select_blocks` launches in prefill."""
    yield selection_launch("selection", target, shape, shape.tokens, False, False)


def forward_launches(target: targets.Target, shape: Shape) -> Iterator[Launch]:
    """What `attention.block_sparse_attention_forward` launches, in either order of work."""
    heads, depth, block, topk = shape.group_size, shape.head_dim, shape.block_size, shape.topk
    config = forward_config.forward_config(
        target, group_size=heads, head_dim=depth, block_size=block, topk=topk, element_size=shape.element
    )
    scale = depth**-0.5
    tokens = config.walk_tokens(heads, topk)
    storage = targets.storage_constants(target, paged=False, scaled=False)
    if config.walk_hopper:
        constants, kernel = walk_hopper.hopper_constants(heads, depth, block, config), walk_hopper.walk_hopper_kernel
        types = box_types(walk_hopper.hopper_boxes(heads, depth, block)) | {"members_ptr": "*i64"}
        yield "forward: walk", kernel, constants, {"num_warps": 4}, types
    else:
        constants = walk.walk_constants(config, heads, depth, block, scale, tokens, False, False, config.walk_tma)
        tile = f"tensordesc<bf16[1,1,{constants['COLUMNS']},{depth}]>" if config.walk_tma else "*bf16"
        types = {"members_ptr": "*i64", "k_tiles": tile, "v_tiles": tile}
        yield "forward: walk", walk.walk_kernel, constants | storage, config.walk_options(), types
    types = LISTS | pointers("bf16", "partial")
    if config.hopper:
        constants = by_block_hopper.hopper_constants(topk, heads, depth, block)
        kernel = by_block_hopper.partial_hopper_kernel
        options = {"num_warps": 4, "maxnreg": by_block_hopper.REGISTERS}
        types |= box_types(by_block_hopper.hopper_boxes(heads, depth, block))
    else:
        constants = by_block.partial_constants(config, heads, depth, block, topk, scale) | storage
        kernel, options = by_block.partial_attention_kernel, config.launch_options()
    yield "forward: partial_attention", kernel, constants, options, types
    constants = combine_slots.combine_constants(heads, depth, topk)
    types |= pointers("i8", "skip") | pointers("i16", "numbers")
    options = {"num_warps": 4}
    yield "forward: combine_slots", combine_slots.combine_slots_kernel, constants, options, types


def backward_launches(target: targets.Target, shape: Shape) -> Iterator[Launch]:
    """The main kernel and the last one of `attention_backward.block_sparse_attention_backward`."""
    heads, depth, block = shape.group_size, shape.head_dim, shape.block_size
    config = backward_config.backward_config(
        target, group_size=heads, head_dim=depth, block_size=block, element_size=shape.element
    )
    types = pointers("bf16", "grad_out partial_q grad_q")
    types |= pointers("fp32", "row_delta row_lse2 partial_k partial_v grad_k grad_v")
    if config.hopper:
        constants = backward_hopper.hopper_constants(config, heads, depth, block)
        kernel, boxes = backward_hopper.gradient_hopper_kernel, backward_hopper.hopper_boxes(heads, depth, block)
        yield "backward: gradient", kernel, constants, {"num_warps": 8}, types | box_types(boxes)
    else:
        constants = backward_gradient.gradient_constants(config, heads, depth, block)
        constants |= {"OFFSET": 0, "stride_gd": 1}
        options = targets.launch_options(config.num_warps, config.num_stages, None)
        yield "backward: gradient", backward_gradient.gradient_kernel, constants, options, types
    inside = backward_gradient.heads_inside(heads) and not config.hopper
    constants = {"HEADS": heads, "HEAD_DIM": depth, "INSIDE": inside, "TILE": 16, "DEPTH": depth}
    yield "backward: sum_slots", backward_sums.sum_slots_kernel, constants, {"num_warps": 8}, types


def loss_launches(target: targets.Target, shape: Shape) -> Iterator[Launch]:
    """The two kernels of `index_loss.index_loss` with products, and the last one."""
    depth, index_depth = shape.head_dim, shape.index_head_dim
    config = loss_config.loss_config(
        target, head_dim=depth, index_head_dim=index_depth, block_size=shape.block_size, element_size=shape.element
    )
    units = {"stride_xd": 1, "stride_yd": 1}
    types = LISTS | {"index_scale": "fp32"} | pointers("bf16", "index_k")
    types |= pointers("fp32", "index_lse unit loss partial_q partial_k grad_k grad_q")
    options = targets.launch_options(4, config.num_stages, None)
    constants = lse_constants(config, index_depth) | units
    yield "loss: block_lse", block_lse_kernel, constants, options, types
    constants = loss_constants(config, depth, index_depth, True) | units
    options = targets.launch_options(config.num_warps, config.num_stages, None)
    yield "loss: index_loss", index_loss_kernel, constants, options, types
    parts = triton.cdiv(shape.block_size, config.columns)
    constants = {"INDEX_DIM": index_depth, "INDEX_DEPTH": index_depth, "PARTS": parts, "ROWS": 16}
    yield "loss: sum_slots", sum_slots_kernel, constants, {"num_warps": 4}, types


def serving_launches(target: targets.Target, shape: Shape) -> Iterator[Launch]:
    """A step of one token: `decode.select_and_attend`, from bf16 and from e4m3 pages, and `append`."""
    groups, heads, depth = shape.num_kv_heads, shape.group_size, shape.head_dim
    block, topk = shape.block_size, shape.topk
    yield selection_launch("decode: select", target, shape, 1, False, False)
    yield selection_launch("decode: select, e4m3", target, shape, 1, True, True)
    config = serving_config.attend_config(
        target, num_rows=groups, head_dim=depth, block_size=block, topk=topk, element_size=shape.element
    )
    ranked = selection_tiles(target, shape, 1, False)
    constants = attend_constants(config, groups, heads, depth, block, topk, False, (ranked.num_splits, ranked.kept))
    options = targets.launch_options(config.num_warps, config.num_stages, None)
    types = pointers("i64", "lists") | (pointers("fp32", "out") if config.num_splits > 1 else {})
    yield "decode: attend", attend_kernel, constants | targets.storage_constants(target, False, False), options, types
    constants |= targets.storage_constants(target, True, True)
    yield "decode: attend, e4m3", attend_kernel, constants, options, types | pointers("u8", "k v")


def compile_all(name: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """A row for each kernel, built for the target of that name."""
    target = TARGETS[name]
    for launches in (selection_launches, forward_launches, backward_launches, loss_launches, serving_launches):
        for label, kernel, constants, options, types in launches(target, shape):
            found = report(build(kernel, target, constants, options, types))
            numbers = {"registers": found.registers, "shared": found.shared, "spills": found.spilled}
            yield {"kernel": label, "target": name, **numbers, "wgmma": found.wgmma}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default: the committed results)")
    options = parser.parse_args(argv)
    shape = Shape()
    rows = []
    print(f"{'kernel':<27} {'target':<7} registers  shared  spills  wgmma")
    for name in options.targets:
        for row in compile_all(name, shape):
            rows.append(row)
            numbers = f"{row['registers']:>9}  {row['shared']:>6}  {row['spills']:>6}"
            print(f"{row['kernel']:<27} {name:<7} {numbers}  {'yes' if row['wgmma'] else 'no'}", flush=True)
    result = {
        "triton": triton.__version__,
        "ridge": round(FLOPS_PER_SECOND / BYTES_PER_SECOND, 1),
        "flops_per_byte": flops_per_byte(shape),
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
