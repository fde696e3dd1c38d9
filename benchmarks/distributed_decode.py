"""Decoding on several GPUs: a part of `benchmarks/distributed.py`.

A step is one token of one long row: selection and attention from a cache, without appending. By heads, if there are as
many groups, each process has its own groups and all index keys, and sends nothing. By keys, the blocks are dealt to the
processes (`ShardedCache`), and candidates and outputs are exchanged. On GPUs a step runs in a CUDA graph.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmsa import AuxRequest, MSACache, decode
from flexmsa.cache import Cache
from flexmsa.distributed import ShardedCache

from .distributed import BLOCK, DEVICE, DTYPE, GPU, TOLERANCE, TOPK, Heads, milliseconds

# Tokens that are appended at once.
CHUNK = 1 << 16


def vectors(heads: Heads, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """q, k, v, index_q and index_k of new tokens, the same on every process."""
    numbers = heads.queries, heads.groups, heads.groups, heads.groups, 1
    return [torch.randn(1, n, tokens, heads.dim, generator=generator, device=DEVICE).to(DTYPE) for n in numbers]


def caches(heads: Heads, tokens: int, mesh: DeviceMesh) -> tuple[dict[str, Cache], list[Tensor]]:
    """Caches of the same row, by how it is shared, and q and index_q of its last token."""
    world, rank = mesh.size(), mesh.get_local_rank()
    generator = torch.Generator(DEVICE).manual_seed(0)

    def new(groups: int, capacity: int) -> MSACache:
        return MSACache(1, groups, heads.dim, heads.dim, capacity=capacity, dtype=DTYPE, device=DEVICE)

    room = -(-tokens // (world * BLOCK)) * BLOCK
    found: dict[str, Cache] = {
        "one": new(heads.groups, room * world),
        "keys": ShardedCache(new(heads.groups, room), mesh, BLOCK),
    }
    if heads.groups % world == 0:
        found["heads"] = new(heads.groups // world, room * world)
    for start in range(0, tokens, CHUNK):
        _, k, v, _, index_k = vectors(heads, min(CHUNK, tokens - start), generator)
        for name, cache in found.items():
            own = (x.chunk(world, dim=1)[rank] if name == "heads" else x for x in (k, v))
            cache.append(*own, index_k)
    q, _, _, index_q, _ = vectors(heads, 1, generator)
    return found, [q, index_q]


def step(name: str, cache: Cache, q: Tensor, index_q: Tensor, mesh: DeviceMesh, **more: Any) -> Any:
    """A step from the cache of this name."""
    if name == "heads":
        q, index_q = (x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()] for x in (q, index_q))
    return decode(q, cache, index_q, block_size=BLOCK, topk=TOPK, **more)


def errors(heads: Heads, mesh: DeviceMesh, tokens: int = 5000) -> list[str]:
    """What differs from one process: ids or out."""
    found, queries = caches(heads, tokens, mesh)
    results = {}
    for name, cache in found.items():
        out, aux = step(name, cache, *queries, mesh, return_aux=AuxRequest(block_indices=True))
        results[name] = out, aux.block_indices.sort().values
    world, rank = mesh.size(), mesh.get_local_rank()
    wrong = []
    for name in found.keys() - {"one"}:
        expected = results["one"] if name == "keys" else [x.chunk(world, dim=1)[rank] for x in results["one"]]
        out, ids = results[name]
        if not torch.equal(ids, expected[1]):
            wrong.append(f"decoding by {name}: other ids")
        difference = (out.float() - expected[0].float()).norm() / expected[0].float().norm()
        if not difference < TOLERANCE:
            wrong.append(f"decoding by {name}: out off by {difference:.1e}")
    return wrong


def measure(heads: Heads, tokens: int, mesh: DeviceMesh, number: int = 8) -> dict[str, Any]:
    """Microseconds of a step, for each way to share the row."""
    found, queries = caches(heads, tokens, mesh)
    row: dict[str, Any] = {"heads": str(heads), "tokens": tokens, "processes": mesh.size()}
    with torch.no_grad():
        for name, cache in found.items():

            def call(name: str = name, cache: Cache = cache) -> object:
                return step(name, cache, *queries, mesh)

            call()
            if GPU:
                # Its module needs Triton, which not every machine without a GPU has.
                from .gpu_serving import captured

                row[f"{name}_us"] = 1e3 * milliseconds(captured([call] * number).replay, 20) / number
            else:
                row[f"{name}_us"] = 1e3 * milliseconds(call, 3)
    dist.barrier()
    return row
