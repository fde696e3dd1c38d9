"""Fragments of documents, whose keys overlap, as a rank of context parallel has them: against the dense definition."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexmsa import AuxRequest, _core
from flexmsa._sequences import Sequences
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.workspace import set_workspace_limit
from flexmsa.testing import assert_close
from flexmsa.testing.check import kernels_for_many_queries
from flexmsa.testing.strategies import packed_lengths

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

EVERYTHING = AuxRequest(lse=True, block_indices=True, index_loss=True)
# Of main scores and of index scores, both of vectors of 16 numbers.
SCALE = 0.25
NAMES = "q", "k", "v", "index_q", "index_k"


def fragments_of(rank, ranks, documents, batch, count=2):
    """(table, positions): documents [(batch row, start, stop, padding), ...] cut into `count` times `ranks` chunks.

    A rank has the chunks that head-tail order gives it, two neighbouring rounds being mirrored. positions: the batch
    row and key of each of its queries.
    """
    chunks = [r * ranks + (ranks - 1 - rank if r % 2 else rank) for r in range(count)]
    table, positions, used = [], [], [0] * batch
    for row, first, end, padding in documents:
        size = -(-(end - first) // (count * ranks))
        table.append([])
        for chunk in chunks:
            start, stop = min(first + chunk * size, end), min(first + (chunk + 1) * size, end)
            queries = used[row], used[row] + stop - start
            table[-1].append([row, *queries, first + padding, max(first + padding, stop)])
            positions += [(row, x) for x in range(start, stop)]
            used[row] = queries[1]
    return torch.tensor(table, dtype=torch.int32), positions


@dataclass(frozen=True)
class Case:
    """Documents [(batch row, start, stop, padding on the left), ...] of Sk keys per row, over `ranks` ranks."""

    documents: tuple[tuple[int, int, int, int], ...]
    ranks: int = 2
    fragments: int = 2
    seqlen: int = 40
    groups: int = 2
    group_size: int = 2
    topk: int | None = 3
    dtype: torch.dtype = torch.float32
    block_size: int = 8


ONE = ((0, 0, 40, 0),)
# One of a single token, and one of none.
PACKED = ((0, 0, 17, 0), (0, 17, 18, 0), (0, 18, 18, 0), (0, 18, 40, 0))
TWO = ((0, 0, 17, 0), (0, 17, 40, 0))
CASES = {
    "one document": Case(ONE),
    "packed": Case(PACKED),
    "five heads": Case(PACKED, group_size=5, groups=1, block_size=16),
    "many fragments": Case(TWO, fragments=5),
    "left padding": Case(((0, 0, 40, 9), (1, 0, 40, 25))),
    "half": Case(PACKED, group_size=8, dtype=torch.float16),
    "dense": Case(PACKED, topk=None),
}


class Share:
    """Some queries of a case's documents, at these positions, and all keys; table: their fragments."""

    def __init__(self, case, table, positions):
        self.case, self.table, self.positions = case, table, positions
        batch = 1 + max(row for row, _ in positions)
        generator = torch.Generator().manual_seed(0)
        heads = case.groups * case.group_size, case.groups, case.groups, case.groups, 1
        all_tensors = [torch.randn(batch, h, case.seqlen, 16, generator=generator).to(case.dtype) for h in heads]
        rows = [[x for at, x in self.positions if at == row] for row in range(batch)]
        queries = [torch.stack([x[b, :, rows[b]] for b in range(batch)]) for x in (all_tensors[0], all_tensors[3])]
        self.tensors = queries[0], all_tensors[1], all_tensors[2], queries[1], all_tensors[4]
        self.rule = None if case.topk is None else SelectionRule(case.block_size, case.topk)

    def run(self, backend, dtype=None, deferred=False, ids=None):
        """(results, ids, gradients) of the core by a backend, in dtype."""
        inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in self.tensors]
        sequences = Sequences.from_table(inputs[0], self.case.seqlen, self.table)
        settings = _core.Settings(self.case.block_size, SCALE, SCALE, self.rule, backend)
        value = torch.full((), torch.nan, dtype=torch.float32 if dtype is None else dtype) if deferred else None
        out, aux = _core.attention(*inputs, sequences, settings, EVERYTHING, block_indices=ids, loss_value=value)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
        main = (out * weight).sum() + aux.lse.masked_fill(~aux.lse.isfinite(), 0.0).sum()
        grads = torch.autograd.grad((main, aux.index_loss), inputs)
        loss = value if deferred else aux.index_loss.detach()
        return {"out": out.detach(), "lse": aux.lse.detach(), "index_loss": loss}, aux.block_indices, grads


def share_of(case, rank):
    """The Share of a rank."""
    batch = 1 + max(document[0] for document in case.documents)
    return Share(case, *fragments_of(rank, case.ranks, case.documents, batch, case.fragments))


def check(share, backend, deferred=False):
    """Compare results with those of the reference, in float64."""
    results, ids, grads = share.run(backend, deferred=deferred)
    exact, right_ids, right = share.run("reference", torch.float64, ids=ids)
    eager, _, baseline = share.run("reference", ids=ids)
    if ids is not None:
        narrow = share.run("reference")[1]
        assert torch.equal(ids, narrow) and torch.equal(ids, right_ids)
    for name, found in results.items():
        term = math.log(1 + share.case.seqlen) if name == "index_loss" else 0.0
        assert_close(name, found, exact[name], eager[name], term)
    # The sizes of the terms that cancel, as in `flexmsa.testing.check`; scale times sqrt(D) is 1.
    q, k, v, index_q, index_k = (float(x.abs().max()) for x in share.tensors)
    rows = max(1, int(results["lse"].isfinite().sum()) // share.case.group_size)
    terms = v * k, v * q, 0.0, SCALE * index_k / rows, SCALE * index_q / rows
    for name, found, expected, other, term in zip(NAMES, grads, right, baseline, terms, strict=True):
        assert_close(f"gradient of {name}", found, expected, other, term)


@pytest.mark.parametrize("name", CASES)
def test_the_count_of_queries_that_see_a_key(name):
    case = CASES[name]
    share = share_of(case, 0)
    padding = {document[0]: document[3] for document in case.documents}
    seen = sum(key >= padding[row] for row, key in share.positions)
    count = Sequences.from_table(share.tensors[0], case.seqlen, share.table).count(case.groups)
    assert count == seen * case.groups


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("deferred", [False, True])
def test_torch(name, deferred):
    with kernels_for_many_queries(torch.empty(0), "torch") if deferred else nullcontext():
        for rank in range(CASES[name].ranks):
            check(share_of(CASES[name], rank), "torch", deferred)


# 16 bits round the teacher that the backward leaves; the warm-up has none.
DEFERRED = [(name, True) for name in CASES if name not in ("half", "dense")]


@pytest.mark.parametrize(("name", "deferred"), [*DEFERRED, ("packed", False), ("half", False), ("dense", False)])
def test_triton(name, deferred):
    case = CASES[name]
    with kernels_for_many_queries(torch.empty(0), "triton"):
        check(share_of(case, case.ranks - 1), "triton", deferred)


@st.composite
def shares(draw):
    """Any fragments of packed documents, some of them without queries or keys."""
    seqlen, count = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    table, positions = [], []
    for first, stop in pairwise(draw(packed_lengths(seqlen))):
        cuts = draw(st.lists(st.integers(first, stop), min_size=2 * count, max_size=2 * count).map(sorted))
        rows = []
        for begin, end in zip(cuts[::2], cuts[1::2], strict=True):
            rows.append([0, len(positions), len(positions) + end - begin, first, end])
            positions += [(0, key) for key in range(begin, end)]
        table.append(rows)
    assume(positions)
    sizes = {"groups": draw(st.integers(1, 2)), "group_size": draw(st.integers(1, 3))}
    topk, block_size = draw(st.sampled_from([1, 2, 3, None])), draw(st.sampled_from([8, 16]))
    case = Case((), seqlen=seqlen, topk=topk, block_size=block_size, **sizes)
    return Share(case, torch.tensor(table, dtype=torch.int32), positions)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(share=shares(), deferred=st.booleans(), many=st.booleans())
def test_any_fragments_torch(share, deferred, many):
    with kernels_for_many_queries(torch.empty(0), "torch") if many else nullcontext():
        check(share, "torch", deferred)


@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(share=shares(), deferred=st.booleans())
def test_any_fragments_triton(share, deferred):
    with kernels_for_many_queries(torch.empty(0), "triton"):
        check(share, "triton", deferred)


def test_few_queries():
    check(share_of(Case(PACKED, ranks=8), 3), "triton")


@pytest.mark.parametrize("topk", [3, None])
def test_token_ranges(topk):
    set_workspace_limit(1)
    with kernels_for_many_queries(torch.empty(0), "triton"):
        check(share_of(Case(TWO, fragments=3, topk=topk), 0), "triton", deferred=topk is not None)


def test_results_repeat_bit_for_bit():
    with kernels_for_many_queries(torch.empty(0), "triton"):
        first, second = (share_of(CASES["packed"], 1).run("triton", deferred=True) for _ in range(2))
    for x, y in zip((*first[0].values(), *first[2]), (*second[0].values(), *second[2]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_together_equal_one_process(backend):
    """Ids bit for bit; out and lse alike; gradients of keys summed over the ranks, of queries each rank's own."""
    case = CASES["packed"]
    with kernels_for_many_queries(torch.empty(0), backend):
        alone = share_of(Case(PACKED, ranks=1, fragments=1), 0)
        weights = torch.randn(alone.tensors[0].shape, generator=torch.Generator().manual_seed(1))
        out, ids, grads = _step(alone, backend, weights)
        total = [torch.zeros_like(x) for x in grads[1:3]]
        for rank in range(case.ranks):
            share = share_of(case, rank)
            place = [key for _, key in share.positions]
            own_out, own_ids, own = _step(share, backend, weights[:, :, place])
            assert torch.equal(own_ids, ids[:, :, place])
            torch.testing.assert_close(own_out, out[:, :, place], rtol=0, atol=1e-6)
            torch.testing.assert_close(own[0], grads[0][:, :, place], rtol=1e-5, atol=1e-5)
            total = [x + y for x, y in zip(total, own[1:3], strict=True)]
    for x, y in zip(total, grads[1:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def _step(share, backend, weights):
    inputs = [x.detach().requires_grad_() for x in share.tensors]
    sequences = Sequences.from_table(inputs[0], share.case.seqlen, share.table)
    settings = _core.Settings(share.case.block_size, SCALE, SCALE, share.rule, backend)
    out, aux = _core.attention(*inputs, sequences, settings, AuxRequest(block_indices=True))
    return out.detach(), aux.block_indices, torch.autograd.grad((out * weights).sum(), inputs[:3])
