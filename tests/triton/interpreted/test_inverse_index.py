"""The inverse index against a plain loop over block_indices."""

from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from flexmsa.kernels.triton.schedule.inverse_index import block_table
from flexmsa.kernels.triton.schedule.make_index import inverse_index, sort_by_counting, sort_by_radix
from flexmsa.kernels.triton.schedule.work_items import cut_into_items

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEQUENCES = {
    "plain": ([[0, 0, 40, 0, 40], [1, 0, 40, 0, 40]], 2, 40, 40),
    "packed": ([[0, 0, 1, 0, 1], [0, 1, 30, 1, 30], [0, 30, 40, 30, 40]], 1, 40, 40),
    "cache": ([[0, 0, 8, 5, 61], [1, 0, 8, 0, 3]], 2, 8, 70),
    # Two documents with fragments, the second of which has its longest fragment without queries.
    "fragments": (
        [
            [[0, 0, 7, 0, 9], [0, 7, 9, 0, 30], [0, 9, 9, 0, 30]],
            [[0, 9, 10, 31, 32], [0, 10, 18, 31, 55], [0, 18, 18, 31, 60]],
        ],
        *(1, 18, 60),
    ),
    # More than one step of the table of blocks takes, and of the bisection; the second has no queries.
    "many": ([[0, 0, 1, 0, 3], [0, 1, 1, 3, 3], *([0, i, i + 1, 3 * i, 3 * i + 3] for i in range(1, 90))], 1, 90, 270),
}
BLOCK = 8


def queries_of(sequences):
    """(batch row, query, its newest block, its document's first block) of each query of [documents][fragments]."""
    first_block = 0
    for rows in sequences:
        for batch, q_start, q_end, k_start, k_end in rows:
            for query in range(q_start, q_end):
                yield batch, query, (k_end - q_end + query - k_start) // BLOCK, first_block
        first_block += -(-max(0, max(row[4] for row in rows) - rows[0][3]) // BLOCK)


def chosen(ids, sequences, seqlen_q, range_tokens, skip):
    """{(group, token_range, block): [(token, slot), ...]}."""
    lists = defaultdict(list)
    for batch, query, newest, first_block in queries_of(sequences):
        token = batch * seqlen_q + query
        for group in range(ids.shape[1]):
            row = ids[batch, group, query].tolist()
            for slot, block in enumerate(row):
                if 0 <= block <= newest and block not in row[:slot] and not (skip is not None and skip[group, token]):
                    lists[group, token // range_tokens, first_block + block].append((token, slot))
    return {name: sorted(entries) for name, entries in lists.items()}


@pytest.mark.parametrize("layout", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("range_tokens", [1000, 13])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("skipping", [False, True])
def test_lists(layout, range_tokens, dtype, skipping):
    rows, batch, seqlen_q, seqlen_k = layout
    groups, topk, length = 2, 3, 4
    ids = torch.randint(-2, 7, (batch, groups, seqlen_q, topk), dtype=dtype)
    ids[0, 0, 0, 0] = 2**31 - 1 if dtype == torch.int32 else 2**40
    skip = (torch.rand(groups, batch * seqlen_q) < 0.3).to(torch.int8) if skipping else None
    index = inverse_index(
        ids,
        torch.tensor(rows, dtype=torch.int32),
        batch=batch,
        num_kv_heads=groups,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_size=BLOCK,
        range_tokens=range_tokens,
        skip=skip,
    )
    found = {}
    num_ranges = index.num_ranges // groups
    for number, offsets in enumerate(index.offsets.tolist()):
        group, token_range = divmod(number, num_ranges)
        for block, (begin, stop) in enumerate(pairwise(offsets)):
            entries = index.entries[begin:stop].tolist()
            if entries:
                found[group, token_range, block] = [(e // topk % index.num_tokens, e % topk) for e in entries]
                assert {e // topk // index.num_tokens for e in entries} == {group}
    documents = [row if isinstance(row[0], list) else [row] for row in rows]
    assert found == chosen(ids, documents, seqlen_q, range_tokens, skip)
    shifts = [k_end - q_end for row in documents for _, q_start, q_end, _, k_end in row for _ in range(q_start, q_end)]
    assert index.shifts is None if len(documents[0]) == 1 else index.shifts.tolist() == shifts

    items = cut_into_items(index, length)
    for number in range(index.num_ranges):
        offsets = index.offsets[number]
        expected, shares, slot = [], [], 0
        for block, (begin, stop) in enumerate(pairwise(offsets.tolist())):
            starts = range(begin, stop, length)
            several = len(starts) if len(starts) > 1 else 0
            shares.append([slot, several])
            for start in starts:
                entries = [start - int(offsets[0]), min(start + length, stop) - int(offsets[0])]
                expected.append([*index.blocks[block].tolist(), *entries, slot if several else -1, block])
                slot += bool(several)
        expected += [[0] * 8] * (items.num_items - len(expected))
        assert items.table[number].tolist() == expected
        assert items.shares[number].tolist() == shares


@pytest.mark.parametrize("range_tokens", [700, 512, 16])
@pytest.mark.parametrize(("sort", "num_blocks"), [(sort_by_counting, 70), (sort_by_radix, 70), (sort_by_radix, 40000)])
def test_both_ways_to_sort(sort, num_blocks, range_tokens):
    """By counting, in several chunks to a range and blocks in two steps; by radix, numbers of 16 and of 32 bits."""
    num_tokens, topk = 700, 3
    index = inverse_index(
        torch.randint(-2, 70, (1, 2, num_tokens, topk)),
        torch.tensor([[0, 0, num_tokens, 0, num_blocks * BLOCK]], dtype=torch.int32),
        batch=1,
        num_kv_heads=2,
        seqlen_q=num_tokens,
        seqlen_k=num_blocks * BLOCK,
        block_size=BLOCK,
        range_tokens=range_tokens,
    )
    expected = defaultdict(list)
    for entry, number in enumerate(index.numbers.flatten().tolist()):
        if number < index.none:
            expected[number].append(entry)
    index.entries.fill_(-1)
    index.offsets.fill_(-1)
    short_numbers = (index.numbers.flatten() - 2**15).to(torch.int16)
    sort(index, short_numbers)
    offsets = index.offsets.tolist()
    found = {
        number * num_blocks + block: index.entries[begin:stop].tolist()
        for number, row in enumerate(offsets)
        for block, (begin, stop) in enumerate(pairwise(row))
        if begin < stop
    }
    assert found == expected and len(offsets) == index.num_ranges


def test_every_visible_block():
    rows = SEQUENCES["packed"][0]
    every = torch.arange(5).expand(1, 1, 40, 5)
    shape = {"batch": 1, "num_kv_heads": 1, "seqlen_q": 40, "seqlen_k": 40, "block_size": BLOCK, "range_tokens": 16}
    sequences = torch.tensor(rows, dtype=torch.int32)
    for tokens in (None, range(10, 33)):
        found, wanted = (inverse_index(ids, sequences, **shape, tokens=tokens) for ids in (None, every))
        assert torch.equal(found.numbers, wanted.numbers) and torch.equal(found.entries, wanted.entries)


def test_block_table():
    rows, batch, _, seqlen_k = SEQUENCES["cache"]
    blocks, before = block_table(torch.tensor(rows, dtype=torch.int32), batch, seqlen_k, BLOCK)
    assert blocks[6:8].tolist() == [[0, 53, 61, 53], [1, 0, 3, -5]]
    assert before.tolist() == [0, 7]
