"""The recalls of selections, against their definition query by query; baselines."""

import pytest
import torch
from helpers import randn

import flexmsa
from flexmsa import metrics

BLOCK, GROUPS = 8, 2


def ranges(batch, seqlen, lengths):
    """For each row and query: the first key of its sequence, and the end of its keys."""
    start = torch.zeros(batch, seqlen, dtype=torch.int64)
    end = torch.arange(1, seqlen + 1).repeat(batch, 1)
    if "cu_seqlens" in lengths:
        for first, last in zip(lengths["cu_seqlens"][:-1], lengths["cu_seqlens"][1:], strict=True):
            start[:, first:last] = first
    if "kv_starts" in lengths:
        start += lengths["kv_starts"][:, None]
    return start, end


def defined(q, k, ids, queries, lengths):
    """[2, groups]: both recalls, by the formulas of the docstring."""
    start, end = ranges(q.shape[0], q.shape[2], lengths)
    found = [[] for _ in range(GROUPS)]
    for b in range(q.shape[0]):
        for group in range(GROUPS):
            for i in queries:
                keys = k[b, group, start[b, i] : end[b, i]].double()
                heads = q[b].unflatten(0, (GROUPS, -1))[group, :, i].double()
                mass = (heads @ keys.T * q.shape[-1] ** -0.5).softmax(-1).mean(0)
                blocks = [float(part.sum()) for part in mass.split(BLOCK)] if len(mass) else []
                chosen = set(ids[b, group, i].tolist()) & set(range(len(blocks)))
                if 0 < len(chosen) < len(blocks):
                    best = sorted(range(len(blocks)), key=lambda block: -blocks[block])[: len(chosen)]
                    both = chosen & set(best)
                    score = sum(blocks[n] for n in both) / sum(blocks[n] for n in best)
                    found[group].append((len(both) / len(best), score))
    return torch.tensor([[sum(x) / len(x) for x in zip(*rows, strict=True)] for rows in found]).T, found


SEQUENCES = {
    "plain": {},
    "left padding": {"kv_starts": torch.tensor([0, 13], dtype=torch.int32)},
    "documents": {"cu_seqlens": torch.tensor([0, 5, 47, 90], dtype=torch.int32)},
}


@pytest.mark.parametrize("num_queries", [None, 7, 500])
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES)
def test_recalls_are_those_of_the_definition(lengths, num_queries, monkeypatch):
    # Several parts of each row.
    monkeypatch.setattr(metrics, "_HELD", 4 * 90 * 11)
    batch = 1 if "cu_seqlens" in lengths else 2
    q, k = randn(batch, 4, 90, 16), randn(batch, GROUPS, 90, 16, seed=1)
    index = randn(batch, GROUPS, 90, 8, seed=2), randn(batch, 1, 90, 8, seed=3)
    ids = flexmsa.select_blocks(*index, block_size=BLOCK, topk=3, **lengths)
    step = 1 if num_queries is None else max(1.0, 90 / num_queries)
    queries = sorted({89 - int(n * step) for n in range(int(90 / step) + 1) if n * step < 90})
    assert len(queries) in (7, 90)
    right, rows = defined(q, k, ids, queries, lengths)
    settings = {"block_size": BLOCK, "num_queries": num_queries, **lengths}
    found = metrics.recalls(q, k, {"index": ids, "all": torch.arange(12).expand(*ids.shape[:3], 12)}, **settings)
    by_group = metrics.recall(q, k, ids, per_group=True, **settings)
    torch.testing.assert_close(torch.stack(by_group), right.float(), rtol=1e-5, atol=1e-5)
    every = torch.tensor([row for group in rows for row in group]).mean(0)
    torch.testing.assert_close(torch.stack(found["index"]), every.float(), rtol=1e-5, atol=1e-5)
    # A selection of all blocks leaves no choice.
    assert found["all"] == (1.0, 1.0)


def test_blocks_that_a_query_does_not_see_are_not_selected():
    q, k = randn(1, 4, 90, 16), randn(1, GROUPS, 90, 16, seed=1)
    ids = torch.tensor([0, 5, 9]).expand(1, GROUPS, 90, 3)
    right, _ = defined(q, k, ids, range(90), {})
    torch.testing.assert_close(torch.stack(metrics.recall(q, k, ids, block_size=BLOCK, per_group=True)), right.float())


def test_autocast_does_not_round_recalls():
    q, k = 5 * randn(1, 4, 90, 16), randn(1, GROUPS, 90, 16, seed=1)
    ids = metrics.window_blocks(q, k, block_size=BLOCK, topk=3)
    expected = metrics.recall(q, k, ids, block_size=BLOCK)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(metrics.recall(q, k, ids, block_size=BLOCK)), torch.stack(expected))


def test_baselines():
    q, k = torch.empty(2, 4, 50, 16), torch.empty(2, GROUPS, 90, 16)
    sizes = {"block_size": BLOCK, "topk": 4}
    window = metrics.window_blocks(q, k, **sizes, num_init_blocks=1)
    assert window.shape == (2, GROUPS, 50, 4) and window.dtype == torch.int32
    assert window[0, 0, -1].tolist() == [0, 9, 10, 11]
    forced = {"num_local_blocks": 3, "num_init_blocks": 1}
    index = torch.zeros(2, GROUPS, 50, 8), torch.zeros(2, 1, 90, 8)
    assert torch.equal(window, flexmsa.select_blocks(*index, **sizes, **forced))
    torch.manual_seed(0)
    chosen = metrics.random_blocks(q, k, **sizes)
    newest = torch.arange(40, 90) // BLOCK
    assert (chosen == newest[:, None]).any(-1).all() and (chosen <= newest[:, None]).all() and (chosen >= 0).all()
    assert all(len(set(row)) == 4 for row in chosen.flatten(0, 2).tolist())
    assert len(chosen.unique()) == 12
    short = metrics.random_blocks(torch.empty(1, 1, 9, 1), torch.empty(1, 1, 9, 1), **sizes)
    assert short[0, 0, -1].sort().values.tolist() == [-1, -1, 0, 1]


def test_recalls_refuse_what_they_cannot_measure():
    q, k = randn(1, 2, 9, 8), randn(1, 1, 9, 8)
    ids = torch.zeros(1, 1, 9, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="num_queries"):
        metrics.recall(q, k, ids, num_queries=0)
    with pytest.raises(ValueError, match="block_indices"):
        metrics.recall(q, k, ids[:, :, :5])
    with pytest.raises(ValueError, match=r"ids from -1 \(no block\) to 2"):
        metrics.recall(q, k, ids + 3, block_size=4)
    with pytest.raises(TypeError, match="selections: expected block_indices by name, got a Tensor"):
        metrics.recalls(q, k, ids)
