"""Decoding from a cache whose blocks are dealt to processes: every step is that of one process, on every process."""

import traceback
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from flexmsa import AuxRequest, MSACache, MSAConfig, MSAttention, PagedMSACache, decode
from flexmsa.distributed import ShardedCache, tensor_parallel_plan

from .processes import device_type, run

FP8 = torch.float8_e4m3fn
HEADS, GROUPS, DEPTH, INDEX_DEPTH, BLOCK, BLOCKS = 6, 2, 8, 6, 4, 24
EVERYTHING = AuxRequest(lse=True, block_indices=True)
# A prompt shorter than a block, rows of which most processes have no key, drafts, ragged chunks, a long chunk.
STEPS = (
    *(("append", 3, None), ("append", 1, None), ("append", 1, (1, 0, 1)), ("append", 40, (40, 0, 17))),
    *(("append", 1, None), ("append", 5, None), ("trim", 3), ("decode", 2), ("trim", (2, 50, 0)), ("decode", 4)),
    *(("append", 3, (2, 3, 0)), ("reorder", (2, 0, 0)), ("decode", 3), ("append", 1, None), ("append", 20, (20, 3, 9))),
    *(("reset",), ("prompt", 18, (18, 0, 4)), ("append", 2, None)),
)
CASES = {
    "float64": {},
    "ties": {"ties": True},
    "more forced blocks": {"ties": True, "topk": 5, "num_local_blocks": 2, "num_init_blocks": 2},
    "as many blocks as are forced": {"topk": 3, "num_local_blocks": 2, "num_init_blocks": 1},
    "more blocks than there are": {"topk": 30},
    "the warm-up": {"topk": None},
    "pages": {"paged": True},
    "index keys in e4m3": {"dtype": torch.float32, "index_dtype": FP8},
    "index keys in int8": {"dtype": torch.float32, "index_dtype": torch.int8},
    "float64 and int8": {"index_dtype": torch.int8},
    "pages in e4m3": {"dtype": torch.float32, "store": FP8, "index_dtype": FP8, "paged": True},
    "bf16": {"dtype": torch.bfloat16},
    "ties in float32": {"dtype": torch.float32, "ties": True, "topk": 5, "num_init_blocks": 1},
}


def new_cache(case, blocks=BLOCKS):
    """A cache with room for so many blocks per row."""
    dtype = case.get("store", case.get("dtype", torch.float64))
    dtypes = {"dtype": dtype, "index_dtype": case.get("index_dtype")}
    sizes = 3, GROUPS, DEPTH, INDEX_DEPTH
    if case.get("paged"):
        return PagedMSACache(*sizes, num_pages=5 * blocks, max_pages=blocks, page_size=BLOCK, **dtypes)
    return MSACache(*sizes, capacity=blocks * BLOCK, **dtypes)


def sharded(case, mesh):
    return ShardedCache(new_cache(case, BLOCKS // mesh.size()), mesh, BLOCK)


def vectors(case, count):
    """q, k, v, index_q and index_k of `count` tokens; with ties, scores are exact and few."""
    heads = (HEADS, DEPTH), (GROUPS, DEPTH), (GROUPS, DEPTH), (GROUPS, INDEX_DEPTH), (1, INDEX_DEPTH)
    dtype = case.get("dtype", torch.float64)
    drawn = [torch.randn(3, h, count, size, dtype=torch.float64) for h, size in heads]
    if case.get("ties"):
        drawn[3:] = [torch.randint(-1, 2, x.shape).double() for x in drawn[3:]]
    return [x.to(dtype) for x in drawn]


def check_steps(mesh, name, steps=STEPS, backend=None):
    case = CASES[name]
    settings = {key: case[key] for key in ("num_local_blocks", "num_init_blocks") if key in case}
    settings.update(block_size=BLOCK, topk=case.get("topk", 3), return_aux=EVERYTHING, backend=backend)
    torch.manual_seed(0)
    caches = new_cache(case), sharded(case, mesh)
    for step, *rest in steps:
        if step in ("prompt", "append", "decode"):
            q, k, v, index_q, index_k = vectors(case, rest[0])
        for cache in caches:
            if step in ("prompt", "append"):
                lens = None if rest[1] is None else torch.tensor(rest[1])
                cache.append(k, v, index_k, lens=lens, backend=backend)
            elif step == "trim":
                cache.trim(rest[0] if isinstance(rest[0], int) else torch.tensor(rest[0]))
            elif step == "reorder":
                cache.reorder(torch.tensor(rest[0]))
            elif step == "reset":
                cache.reset()
        assert torch.equal(caches[0].kv_lens, caches[1].kv_lens), step
        if step in ("append", "decode"):
            compare(*(decode(q, cache, index_q, **settings) for cache in caches), q.dtype)
    caches[1].check()
    total = caches[1].local.kv_lens.clone()
    torch.distributed.all_reduce(total)
    assert torch.equal(total, caches[0].kv_lens)


def compare(expected, found, dtype):
    (out, aux), (got, found_aux) = expected, found
    if aux.block_indices is not None:
        assert torch.equal(found_aux.block_indices, aux.block_indices)
        assert found_aux.block_indices.dtype == torch.int32
    assert got.dtype == dtype
    # PyTorch's kernel for 16 bits on CPUs has an exponential of few bits: on one with AVX2 its lse is off by 2e-5.
    tolerances = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 2e-6), torch.bfloat16: (2e-2, 1e-4)}
    for x, y, tolerance in zip((got, found_aux.lse), (out, aux.lse), tolerances[dtype], strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    same = got.clone()
    torch.distributed.broadcast(same, 0)
    assert torch.equal(same, got), "processes differ"


def check_blocks_of_another_layer(mesh):
    torch.manual_seed(1)
    case = CASES["float64"]
    q, k, v, _, index_k = vectors(case, 50)
    caches = new_cache(case), sharded(case, mesh)
    ids = torch.randint(-2, 14, (3, GROUPS, 50, 4), dtype=torch.int32)
    ids[..., 0] = torch.tensor([2**31 - 1, -(2**31)]).int().repeat(25)
    wide = ids.repeat(1, 1, 1, 150)
    for cache in caches:
        cache.append(k, v, index_k)
    for given in (ids, wide):
        settings = {"block_size": BLOCK, "block_indices": given, "return_aux": AuxRequest(lse=True)}
        compare(*(decode(q, cache, None, **settings) for cache in caches), q.dtype)


def check_layer(mesh):
    """A layer takes the cache as any other: prompts of unequal lengths, then tokens."""
    torch.manual_seed(2)
    config = MSAConfig(32, num_heads=HEADS, num_kv_heads=GROUPS, head_dim=8, index_head_dim=6, block_size=BLOCK, topk=2)
    layer = MSAttention(config).double().eval()
    prompt, token = torch.randn(2, 23, 32).double(), torch.randn(2, 2, 32).double()
    found = []
    for cache in (layer.new_cache(2, 64), ShardedCache(layer.new_cache(2, 64 // mesh.size()), mesh, BLOCK)):
        with torch.no_grad():
            first, _ = layer(prompt, cache=cache, lens=torch.tensor([23, 2]))
            found.append(torch.cat([first, layer(token, cache=cache)[0]], dim=1))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="block_size: expected that by which the cache is cut, 4, got 8"):
        MSAttention(replace(config, block_size=8)).double().eval()(prompt, cache=cache)


def check_two_dimensions(mesh):
    """Heads over two of four processes, keys over the other two."""
    torch.manual_seed(3)
    config = MSAConfig(32, num_heads=HEADS, num_kv_heads=GROUPS, head_dim=8, index_head_dim=6, block_size=BLOCK, topk=2)
    layer, x = MSAttention(config).double().eval(), torch.randn(2, 23, 32).double()
    mesh = init_device_mesh(device_type(), (2, 2), mesh_dim_names=("tp", "cp"))
    with torch.no_grad():
        expected, _ = layer(x, cache=layer.new_cache(2, 32))
        parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer))
        found, _ = layer(x, cache=ShardedCache(layer.new_cache(2, 16), mesh["cp"], BLOCK))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def check_bytes(mesh):
    """Two collectives per step, of the sizes that docs/distributed.md says."""
    case = CASES["bf16"]
    q, k, v, index_q, index_k = vectors(case, 2)
    cache, sizes = sharded(case, mesh), []

    class Sizes(CommDebugMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "all_gather" in str(function):
                sizes.append(args[0].numel() * args[0].element_size())
            return super().__torch_dispatch__(function, types, args, kwargs)

    with Sizes() as collectives:
        cache.append(k, v, index_k)
        decode(q, cache, index_q, block_size=BLOCK, topk=3)
    assert collectives.get_total_counts() == 2
    batch, tokens, topk = 3, 2, 3
    assert sizes == [batch * tokens * GROUPS * topk * 8, batch * tokens * HEADS * (DEPTH * 2 + 4)]


def check_balance(mesh):
    """Rows grow by turns: no process has more than a block more than another."""
    cache = sharded({}, mesh)
    for count in (1, 9, 30, 2):
        _, k, v, _, index_k = vectors({}, count)
        cache.append(k, v, index_k)
        lens = torch.zeros(mesh.size(), 3, dtype=torch.int32)
        lens[mesh.get_local_rank()] = cache.local.kv_lens
        torch.distributed.all_reduce(lens)
        assert (lens.amax(0) - lens.amin(0)).max() <= BLOCK and (lens.sum(0) == cache.kv_lens).all()
        assert (lens.diff(dim=0) <= 0).all()


def check_room(mesh):
    """A full row raises on every process, and changes nothing."""
    cache = sharded({}, mesh)
    _, k, v, _, index_k = vectors({}, BLOCKS * BLOCK)
    cache.append(k, v, index_k, lens=torch.tensor([BLOCKS * BLOCK - 1, 1, 2]))
    message = (
        f"cache: expected at most 1 more tokens in row 0, got 2: it holds {BLOCKS * BLOCK - 1} of {BLOCKS * BLOCK}"
    )
    with pytest.raises(ValueError, match=message):
        cache.append(k[:, :, :2], v[:, :, :2], index_k[:, :, :2])
    assert cache.kv_lens.tolist() == [BLOCKS * BLOCK - 1, 1, 2]
    cache.append(k[:, :, :1], v[:, :, :1], index_k[:, :, :1])
    assert cache.local.kv_lens[0] == BLOCKS * BLOCK // mesh.size()
    paged = sharded({"paged": True}, mesh)
    # On every process, also where the part would fit.
    with pytest.raises(ValueError, match=f"tokens: expected at most {paged.capacity}, the capacity of a row"):
        paged.reserve(paged.capacity + 1)
    paged.reserve(BLOCK * mesh.size() + 1)
    assert paged.local.num_free_pages == 5 * (BLOCKS // mesh.size()) - 3 * (2 if mesh.get_local_rank() == 0 else 1)


def check_refusals(mesh):
    local = new_cache({}, 6)
    with pytest.raises(TypeError, match="local: expected an MSACache or a PagedMSACache, got ShardedCache"):
        ShardedCache(ShardedCache(local, mesh, BLOCK), mesh, BLOCK)
    with pytest.raises(ValueError, match="local: expected whole blocks of 5 tokens, got a capacity of 24"):
        ShardedCache(local, mesh, 5)
    with pytest.raises(ValueError, match="local: expected pages of 8 tokens, got 4"):
        ShardedCache(new_cache({"paged": True}, 6), mesh, 8)
    padded = MSACache(2, GROUPS, DEPTH, INDEX_DEPTH, 24, kv_starts=torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ValueError, match="local: expected an empty cache without left padding"):
        ShardedCache(padded, mesh, BLOCK)
    cache = ShardedCache(local, mesh, BLOCK)
    q, _, _, index_q, _ = vectors({}, 1)
    with pytest.raises(NotImplementedError, match="backend='reference' has no kernel for a ShardedCache"):
        decode(q, cache, index_q, block_size=BLOCK, topk=2, backend="reference")
    with pytest.raises(TypeError, match="local: expected a PagedMSACache to reserve pages of, got MSACache"):
        cache.reserve(3)


def check_compiled(mesh):
    torch._dynamo.reset()
    caches = sharded({"dtype": torch.float32}, mesh), sharded({"dtype": torch.float32}, mesh)

    def step(cache, q, k, v, index_q, index_k):
        cache.append(k, v, index_k)
        return decode(q, cache, index_q, block_size=BLOCK, topk=3)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (2, 2, 2, 2):
        given = vectors({"dtype": torch.float32}, count)
        assert torch.equal(compiled(caches[0], *given), step(caches[1], *given))


# All checks in one start of the processes, which takes longer than most of them.
CHECKS = {
    **{f"steps, {name}": (check_steps, name) for name in CASES},
    **{
        check.__name__: (check,)
        for check in (
            *(check_blocks_of_another_layer, check_layer, check_bytes, check_balance, check_room, check_refusals),
        )
    },
}


def failures(world):
    """What failed, by check."""
    mesh, found = init_device_mesh(device_type(), (world,)), []
    if world == 2:
        # Compiled code does not depend on the number of processes, and takes seconds.
        checks = CHECKS | {"compiled": (check_compiled,)}
    else:
        formats = {f"steps, {name}" for name, case in CASES.items() if "dtype" in case or case.get("topk", 3) is None}
        checks = {name: check for name, check in CHECKS.items() if name not in formats}
        checks["two dimensions"] = (check_two_dimensions,)
    for name, (check, *arguments) in checks.items():
        try:
            check(mesh, *arguments)
        except Exception:
            found.append(f"{name}: {traceback.format_exc()}")
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world):
    for found in run(world, failures, world):
        assert not found, f"{len(found)} checks failed\n" + "\n".join(found)
