"""What PyTorch's tools and a reader see: FLOP counts, profiles, representations; and the layer's paged caches."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import make_inputs
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import flexmsa
from flexmsa import AuxRequest, MSACache, MSAConfig, MSAttention, PagedMSACache
from flexmsa.distributed import ShardedCache

CONFIG = MSAConfig(32, num_heads=6, num_kv_heads=2, head_dim=16, index_head_dim=8, block_size=8, topk=3)
BATCH, GROUPS, GROUP_SIZE, DEPTH, BLOCK = 2, 2, 3, 16, 8


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).removeprefix("flexmsa."): count for op, count in counter.get_flop_counts()["Global"].items()}


def keys_of(ids, seqlen_q, seqlen_k):
    """The keys of the selected blocks that queries see, one by one, over batch and groups; None: all that they see."""
    total = 0
    for query in range(seqlen_q):
        end = seqlen_k - seqlen_q + query + 1
        if ids is None:
            total += BATCH * GROUPS * max(end, 0)
            continue
        for row in ids[:, :, query].flatten(0, 1).tolist():
            total += sum(max(0, min(end, (block + 1) * BLOCK) - block * BLOCK) for block in row if block >= 0)
    return total


@pytest.mark.parametrize(("topk", "in_backward"), [(3, False), (3, True), (1, False), (None, False), (None, True)])
@pytest.mark.parametrize("seqlen_q", [61, 40])
def test_flops_are_those_of_the_selected_keys(topk, in_backward, seqlen_q):
    inputs = make_inputs(61, batch=BATCH).rows(slice(61 - seqlen_q, None), slice(None))
    inputs = [x.detach().requires_grad_() for x in inputs]
    wanted, ids = AuxRequest(index_loss=True, block_indices=True), []

    def step():
        value = torch.tensor(torch.nan) if in_backward else None
        settings = {"block_size": BLOCK, "topk": topk, "return_aux": wanted, "index_loss_value": value}
        out, aux = flexmsa.attention(*inputs, **settings)
        ids.append(aux.block_indices)
        (out.sum() + aux.index_loss).backward()

    found = counted(step)
    product = 2 * DEPTH * keys_of(ids[0], seqlen_q, 61)
    main = product * GROUP_SIZE
    if topk is None or not in_backward:
        expected = {"block_sparse_attention": 2 * main, "block_sparse_attention_backward": 5 * main}
        expected["index_loss"] = main + 3 * product
    else:
        # The probabilities of the main branch are there.
        expected = {"attention_and_index_loss": 2 * main}
        expected["attention_and_index_loss_backward"] = 5 * main + 3 * product
    if topk is not None:
        expected["select_blocks"] = 2 * DEPTH * keys_of(None, seqlen_q, 61)
    assert found == expected


def test_flops_of_a_decoding_step_are_those_of_a_full_cache():
    paged = PagedMSACache(BATCH, GROUPS, DEPTH, DEPTH, num_pages=20, max_pages=10, page_size=BLOCK)
    for cache in (MSACache(BATCH, GROUPS, DEPTH, DEPTH, capacity=80), paged):
        new = make_inputs(1, batch=BATCH)
        cache.append(new.k, new.v, new.index_k)
        found = counted(
            lambda cache=cache, new=new: flexmsa.decode(new.q, cache, new.index_q, block_size=BLOCK, topk=3)
        )
        heads = BATCH * GROUPS
        assert found == {"select_and_attend": 2 * DEPTH * heads * (80 + 2 * GROUP_SIZE * 3 * BLOCK)}
        ids = torch.zeros(BATCH, GROUPS, 1, 4, dtype=torch.int32)
        found = counted(partial(flexmsa.decode, new.q, cache, None, block_size=BLOCK, block_indices=ids))
        assert found == {"attend_blocks": 4 * DEPTH * heads * GROUP_SIZE * 4 * BLOCK}


@pytest.mark.parametrize("first", ["flexmsa", "torch.utils.flop_counter"])
def test_formulas_are_there_whatever_is_imported_first(first):
    second = {"flexmsa", "torch.utils.flop_counter"} - {first}
    code = f"import sys, {first}; print('triton' in sys.modules); import {second.pop()} as other\n"
    code += "from torch.utils.flop_counter import flop_registry\n"
    code += "print(len([op for op in flop_registry if 'flexmsa' in str(op)]), 'flop' in str(sys.meta_path[0]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    has_triton, number, hooked = run.stdout.split()
    assert (number, hooked) == ("9", "False")
    assert first != "flexmsa" or has_triton == "False"


def ranges(call):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return {event.key.removeprefix("flexmsa: ") for event in found.key_averages() if event.key.startswith("flexmsa: ")}


def test_a_profile_shows_the_steps():
    layer, x = MSAttention(CONFIG), torch.randn(1, 30, 32)
    assert ranges(lambda: layer(x)) == {"project", "select blocks", "attend", "index loss", "project the output"}
    decoded = {"project", "append", "decode", "project the output"}
    with torch.no_grad():
        assert ranges(lambda: layer(x, cache=layer.new_cache(1, 40))) == decoded
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        out, _ = compiled(x)
        with profile(activities=[ProfilerActivity.CPU]):
            torch.testing.assert_close(compiled(x)[0], out)


def test_without_a_profiler_no_range_is_made(monkeypatch):
    def record_function(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", record_function)
    layer = MSAttention(CONFIG)
    layer(torch.randn(1, 30, 32))


def test_a_layer_makes_a_paged_cache():
    layer, x = MSAttention(CONFIG).requires_grad_(False), torch.randn(2, 30, 32)
    caches = layer.new_cache(2, 30), layer.new_cache(2, 30, paged=True), layer.new_cache(2, 30, paged=True, num_pages=9)
    assert [cache.k.shape for cache in caches[1:]] == [(8, 2, 8, 16), (9, 2, 8, 16)]
    assert caches[1].capacity == 32 and caches[1].page_size == CONFIG.block_size
    outs = [torch.cat([layer(part, cache=cache)[0] for part in x.split(17, dim=1)], dim=1) for cache in caches]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    half = layer.bfloat16().new_cache(2, 30, paged=True, index_dtype=torch.float8_e4m3fn)
    assert half.k.dtype == torch.bfloat16 and half.index_k.dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match="kv_starts: expected None with paged=True"):
        layer.new_cache(2, 30, torch.zeros(2, dtype=torch.int32), paged=True)
    with pytest.raises(ValueError, match="num_pages: expected None without paged=True"):
        layer.new_cache(2, 30, num_pages=4)


def test_a_cache_shows_its_sizes_and_its_tokens():
    cache = MSACache(2, 1, 16, 8, capacity=32, index_dtype=torch.float8_e4m3fn)
    cache.append(*(torch.ones(2, 1, 5, d) for d in (16, 16, 8)), lens=torch.tensor([5, 2]))
    sizes = "batch_size=2, num_kv_heads=1, head_dim=16, index_head_dim=8, capacity="
    dtypes = "dtype=torch.float32, index_dtype=torch.float8_e4m3fn, device="
    assert repr(cache) == f"MSACache({sizes}32, {dtypes}'cpu', kv_lens=[5, 2])"
    paged = PagedMSACache(2, 1, 16, 8, num_pages=6, max_pages=4, page_size=4, device="meta", index_dtype=torch.float16)
    assert repr(paged).startswith(
        f"PagedMSACache({sizes}16, num_pages=6, max_pages=4, page_size=4, dtype=torch.float32"
    )
    assert repr(paged).endswith("device='meta', longest<=0)")
    assert ShardedCache.__repr__ is MSACache.__repr__
