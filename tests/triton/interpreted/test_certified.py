"""Selection certified from int8 scores against the dense definition, ids compared exactly.

Numbers are multiples of 1/16 of few bits, or powers of two, so that scores have no rounding and ties are real. The
interpreter does not multiply bf16: fp16 stands for it, and fp32 where numbers are larger.
"""

from dataclasses import replace

import pytest
import torch
from helpers import dense_selection, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import flexmsa
from flexmsa.kernels import triton, workspace
from flexmsa.kernels.problem import Problem
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.launch import record
from flexmsa.kernels.triton.common.target import assume_target
from flexmsa.kernels.triton.selection import launch as selection
from flexmsa.kernels.triton.selection.certified import choose, launch
from flexmsa.kernels.triton.selection.config import default_config
from flexmsa.kernels.triton.selection.launch import choose_config, select_blocks
from flexmsa.testing.launches import TARGETS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def grid(*shape):
    return torch.randn(shape).clamp(-3, 3).mul(16).round().div(16)


def certified_config(index_q, index_k, sequences, rule):
    config = choose_config(index_q, index_k, sequences, rule)
    return replace(config, columns=rule.block_size, num_splits=1, certified=True)


def check(index_q, index_k, rule, sequences=None, dtype=torch.float16):
    """Compare all ids; the number of rows that were marked is returned, of each batch row."""
    index_q, index_k = index_q.to(dtype), index_k.to(dtype)
    if sequences is None:
        sequences = plain(index_q.shape[0], index_q.shape[2], index_k.shape[2])
    counts = []

    def keep(kernel, grid, arguments, *options):
        run(kernel, grid, arguments, *options)
        if kernel is launch.merge_marked_kernel:
            counts.append(int(arguments["marked"].count[0]))

    run, launch.launch = launch.launch, keep
    try:
        config = certified_config(index_q, index_k, sequences, rule)
        found = select_blocks(index_q, index_k, sequences, rule, config=config)
    finally:
        launch.launch = run
    torch.testing.assert_close(found, dense_selection(index_q, index_k, sequences, rule), rtol=0, atol=0)
    return counts


class Fenced(TorchDispatchMode):
    """Makes new tensors with room around them, of which `broken` counts the bytes that were written to."""

    def __init__(self):
        super().__init__()
        self.fences = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.empty.memory_format:
            return made
        size = made.numel() * made.element_size()
        room = torch.full((size + 8192,), 77, dtype=torch.uint8)
        self.fences += room[:4096], room[4096 + size :]
        return room[4096 : 4096 + size].view(made.dtype).view(made.shape)

    def broken(self):
        return sum(int((fence != 77).sum()) for fence in self.fences)


def integers(q, k):
    return q.round(), k.round()


def equal_keys(q, k):
    return q, k[:, :, :1].expand_as(k)


def zeros(q, k):
    return q * (torch.rand(q.shape[:3]) < 0.7)[..., None], k * (torch.rand(k.shape[:3]) < 0.7)[..., None]


def huge_key(q, k):
    k = k.clone()
    k[:, :, k.shape[2] // 3] *= 1024
    return q, k


def wild(q, k):
    q, k = q.clone(), k.clone()
    for x in (q, k):
        for value in (torch.nan, torch.inf, -torch.inf):
            x.view(-1)[torch.randint(x.numel(), ())] = value
    return q, k


def denormal(q, k):
    return q * 2.0**-12, k * (2.0 ** torch.randint(-20, 1, k.shape[:3]))[..., None]


def vast(q, k):
    """In fp32 only: beyond what has bounds."""
    return q, k * (2.0 ** (50 * torch.randint(-1, 2, k.shape[:3])))[..., None]


KINDS = (integers, equal_keys, zeros, huge_key, wild, denormal, lambda q, k: (q, k))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_id_is_that_of_the_definition(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    block_size = data.draw(st.sampled_from([64, 128]))
    batch, groups, depth = (data.draw(st.sampled_from(x)) for x in ((1, 2), (1, 3, 4), (32, 64)))
    seqlen_q, seqlen_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 1500))
    local, init = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2))
    rule = SelectionRule(block_size, data.draw(st.integers(local + init, 6)), local, init)
    sequences = plain(batch, seqlen_q, seqlen_k)
    for row in sequences:
        row[4] = data.draw(st.integers(0, seqlen_k))
        row[3] = data.draw(st.integers(0, int(row[4])))
    workspace.set_workspace_limit(data.draw(st.sampled_from([1, 1 << 30])))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]))
    kind = data.draw(st.sampled_from(KINDS if dtype == torch.float16 else (*KINDS, vast)))
    check(*kind(grid(batch, groups, seqlen_q, depth), grid(batch, 1, seqlen_k, depth)), rule, sequences, dtype)


def test_few_rows_of_normal_keys_are_marked():
    torch.manual_seed(0)
    assert check(grid(1, 4, 64, 128), grid(1, 1, 3000, 128), SelectionRule(64, 8))[0] <= 5


@pytest.mark.parametrize("kind", [equal_keys, wild])
def test_rows_with_more_blocks_than_places(kind):
    torch.manual_seed(0)
    q, k = kind(grid(1, 4, 16, 32), grid(1, 1, 64 * 110, 32))
    marked = check(q, k, SelectionRule(64, 4))[0]
    assert marked == 64 if kind is equal_keys else 0 < marked < 64


def test_more_marked_rows_than_have_their_keys_shared_out(monkeypatch):
    """Of other ids each, in two launches."""
    torch.manual_seed(0)
    monkeypatch.setattr(launch, "SHARED_TILES", 1)
    monkeypatch.setattr(choose, "DOUBT", choose.tl.constexpr(-3.0))
    q, k, rule = grid(1, 4, 40, 64), grid(1, 1, 2000, 64), SelectionRule(64, 6, 1, 1)
    rows = certified_config(q.half(), k.half(), plain(1, 40, 2000), rule).rows
    assert check(q, k, rule)[0] > rows


def test_a_few_huge_keys_mark_no_other_rows():
    torch.manual_seed(0)
    q, k = huge_key(grid(1, 2, 32, 64), grid(1, 1, 3000, 64))
    assert check(q, k, SelectionRule(64, 8))[0] <= 3


def test_a_wrong_guess_marks_rows(monkeypatch):
    torch.manual_seed(0)
    q, k, rule = grid(1, 4, 32, 64), grid(1, 1, 2000, 64), SelectionRule(64, 6)
    assert check(q, k, rule)[0] <= 3
    # Above the threshold in place of below it.
    monkeypatch.setattr(choose, "DOUBT", choose.tl.constexpr(-3.0))
    assert check(q, k, rule)[0] > 32


def test_a_bound_that_is_not_a_number_rules_nothing_out():
    """A vast query has infinite bounds; of a block of zeros, whose score is the best, they are not a number."""
    q, k = grid(1, 2, 4, 32).abs() * 2.0**60, -grid(1, 1, 900, 32).abs()
    k[:, :, 192:256] = 0
    check(q, k, SelectionRule(64, 4), dtype=torch.float32)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_nothing_is_written_outside_of_buffers(block_size):
    """Nor for the rows that fill up the last tile, which would see a block behind the last one."""
    torch.manual_seed(0)
    with Fenced() as memory:
        check(grid(1, 1, 5, 32), grid(1, 1, 640, 32), SelectionRule(block_size, 3))
    assert memory.fences and memory.broken() == 0


def test_ids_with_strides():
    q, k, rule = grid(2, 3, 20, 32).half(), grid(2, 1, 700, 32).half(), SelectionRule(64, 3)
    sequences = plain(2, 20, 700)
    ids = torch.full((2, 20, 3, 3), -7, dtype=torch.int32).transpose(1, 2)
    select_blocks(q, k, sequences, rule, ids=ids, config=certified_config(q, k, sequences, rule))
    torch.testing.assert_close(ids, dense_selection(q, k, sequences, rule), rtol=0, atol=0)


def test_the_operator(monkeypatch):
    """It reads nothing back to the host: its fake form, on meta tensors, and the real one agree."""
    monkeypatch.setattr(selection, "choose_config", lambda *given: certified_config(*given[:4]))
    q, k = grid(2, 3, 20, 32).half(), grid(2, 1, 700, 32).half()
    given = q, k, plain(2, 20, 700), 64, 3, 1, 0, "triton"
    torch.library.opcheck(torch.ops.flexmsa.select_blocks.default, given)
    torch.testing.assert_close(
        torch.ops.flexmsa.select_blocks(*given), dense_selection(q, k, given[2], SelectionRule(64, 3)), rtol=0, atol=0
    )


def test_when_it_is_the_default():
    """From shapes alone: one long sequence, of what was measured to be faster."""
    half, long, problem = 1 << 16, 1 << 17, Problem(4, torch.bfloat16, index_head_dim=128, topk=16)

    def chosen(name="sm_90", seqlen_q=long, seqlen_k=long, known_keys=None, **changes):
        given = replace(problem, **changes), TARGETS[name], 1, seqlen_q, seqlen_k
        return default_config(*given, known_keys=seqlen_k if known_keys is None else known_keys).certified

    assert chosen() and chosen(num_kv_heads=8) and chosen(seqlen_k=8 * long)
    assert not any(chosen(name) for name in TARGETS if name != "sm_90")
    # So many queries, which see so many keys on average.
    few = 1 << 14
    assert chosen(seqlen_q=few, seqlen_k=half + few // 2) and chosen(seqlen_q=half, seqlen_k=half + half // 2)
    assert not chosen(seqlen_q=few - 1) and not chosen(seqlen_k=long - 1)
    assert not chosen(seqlen_q=few, seqlen_k=half + few // 2 - 1) and not chosen(seqlen_q=half, seqlen_k=half)
    others = {"dtype": torch.float16, "index_head_dim": 64, "block_size": 64, "topk": 33, "paged": True}
    others |= {"key_dtype": torch.float8_e4m3fn, "num_kv_heads": 1}
    assert not any(chosen(**{name: value}) for name, value in others.items())
    assert not chosen(known_keys=0)


def is_certified(seqlen, *table, batch=1):
    q, k = (torch.empty(batch, heads, seqlen, 128, dtype=torch.bfloat16, device="meta") for heads in (4, 1))
    with assume_target(TARGETS["sm_90"]):
        return choose_config(q, k, torch.empty(*table, device="meta"), SelectionRule(128, 16)).certified


def test_sequences_of_unknown_lengths_take_the_other_kernel():
    """Packed documents, fragments, and rows of a batch, which may be padded."""
    assert is_certified(1 << 17, 1, 5)
    assert not is_certified(1 << 17, 2, 5) and not is_certified(1 << 17, 1, 1, 5)
    assert not is_certified(1 << 17, 2, 5, batch=2)


@pytest.mark.parametrize(("seqlen", "certified"), [(1 << 16, False), (1 << 17, True)])
def test_a_cache_that_may_hold_few_keys_takes_the_other_kernel(seqlen, certified):
    """Its capacity is the only number of keys that is known, but for those of the new tokens."""
    q, index_q = (torch.empty(1, heads, seqlen, 128, dtype=torch.bfloat16, device="meta") for heads in (64, 4))
    k, index_k = (torch.empty(1, heads, 1 << 20, 128, dtype=torch.bfloat16, device="meta") for heads in (4, 1))
    table = torch.empty(1, 5, dtype=torch.int32, device="meta")
    with record(TARGETS["sm_90"]) as launches:
        triton.select_and_attend(q, index_q, k, k, index_k, table, SelectionRule(128, 16), 0.1)
    assert ("scan_kernel" in [launch.kernel.__name__ for launch in launches]) is certified
    with assume_target(TARGETS["sm_90"]):
        assert choose_config(index_q, index_k, table, SelectionRule(128, 16)).certified


def test_it_can_be_switched_off():
    flexmsa.set_certified_selection(False)
    try:
        assert not is_certified(1 << 17, 1, 5)
    finally:
        flexmsa.set_certified_selection(True)
    assert is_certified(1 << 17, 1, 5)
    with pytest.raises(TypeError, match="enabled: expected True or False, got int"):
        flexmsa.set_certified_selection(0)


def test_ranges_that_do_not_fill_the_gpu_take_the_other_kernel():
    assert is_certified(1 << 20, 1, 5) and not is_certified(1 << 21, 1, 5) and not is_certified(1 << 22, 1, 5)
    workspace.set_workspace_limit(1 << 32)
    assert is_certified(1 << 22, 1, 5)
    workspace.set_workspace_limit(1 << 26)
    assert not is_certified(1 << 17, 1, 5)


def test_packed_documents_are_refused():
    q, k, rule = grid(1, 2, 20, 32).half(), grid(1, 1, 700, 32).half(), SelectionRule(64, 3)
    sequences = torch.tensor([[0, 0, 5, 0, 300], [0, 5, 20, 300, 700]], dtype=torch.int32)
    config = certified_config(q, k, sequences, rule)
    with pytest.raises(AssertionError, match="packed documents"):
        select_blocks(q, k, sequences, rule, config=config)


@pytest.mark.parametrize("limit", [1 << 16, 1 << 24, 1 << 30])
@pytest.mark.parametrize(("groups", "seqlen"), [(4, 1 << 17), (8, 1 << 20), (4, 300)])
def test_buffers_fit_the_workspace(limit, groups, seqlen):
    workspace.set_workspace_limit(limit)
    num_blocks = seqlen // 128
    tokens = min(seqlen, launch.range_size(TARGETS["sm_90"], groups, num_blocks, 128))
    buffers = launch.range_buffers(-(-tokens * groups // 128) * 128, num_blocks, 128, torch.device("meta"))
    tensors = {id(x): x for value in buffers.values() for x in (value if isinstance(value, tuple) else (value,))}
    used = sum(x.numel() * x.element_size() for x in tensors.values())
    # Rounds may take a third more, rows are whole tiles, and lists have an entry per block.
    assert used <= limit * 4 // 3 + 128 * (num_blocks * 17 // 8 + 2048) + 16 * num_blocks
