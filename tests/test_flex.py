"""FlexAttention with the packed BlockMask, eager and compiled."""

import pytest
import torch
from helpers import lengths, make_inputs
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

import flexmsa
from flexmsa import create_block_mask, pack_gqa, packed_flex_attention, unpack_gqa
from flexmsa.backends import dense_backend
from flexmsa.testing import assert_close

SEQUENCES = [
    {},
    {"cu_seqlens": lengths(0, 1, 30, 30, 37, 70)},
    {"kv_starts": lengths(21)},
    {"kv_starts": lengths(3), "kv_lens": lengths(62)},
]


def _selected(inputs, **settings):
    ids = flexmsa.select_blocks(inputs.index_q, inputs.index_k, **settings)
    q, k, v = (x.double() for x in inputs[:3])
    del settings["topk"]
    exact = flexmsa.block_sparse_attention(q, k, v, ids, backend="reference", **settings)
    eager = flexmsa.block_sparse_attention(*inputs[:3], ids, backend="reference", **settings)
    return ids, exact, eager


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("group_size", [1, 3, 6, 16])
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("block_size", [7, 16])
def test_the_mask_is_exact_in_eager_flex_attention(group_size, sequences, block_size):
    inputs = make_inputs(70, group_size=group_size)
    ids, exact, eager = _selected(inputs, block_size=block_size, topk=3, **sequences)
    mask = create_block_mask(ids, num_heads=inputs.q.shape[1], seqlen_k=70, block_size=block_size, **sequences)
    out = unpack_gqa(flex_attention(pack_gqa(inputs.q, 2), *inputs[1:3], block_mask=mask), inputs.q.shape[1])
    assert_close("out", out, exact, eager)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("sequences", [SEQUENCES[0], SEQUENCES[1]])
def test_the_mask_is_exact_in_compiled_flex_attention(group_size, sequences):
    inputs = make_inputs(70, group_size=group_size)
    ids, exact, eager = _selected(inputs, block_size=16, topk=3, **sequences)
    out = flexmsa.block_sparse_attention(*inputs[:3], ids, block_size=16, backend="flex", **sequences)
    assert_close("out", out, exact, eager)


def test_the_warm_up_is_dense_in_flex_attention():
    q, k, v, _, _ = make_inputs(70, group_size=2)
    out = flexmsa.block_sparse_attention(q, k, v, None, backend="flex")
    exact = flexmsa.block_sparse_attention(q.double(), k.double(), v.double(), None)
    eager = flexmsa.block_sparse_attention(q, k, v, None, backend="reference")
    assert_close("out", out, exact, eager)


def test_a_score_mod_sees_packed_coordinates():
    inputs = make_inputs(48, group_size=2)
    q, k, v, _, _ = inputs
    ids = flexmsa.select_blocks(inputs.index_q, inputs.index_k, block_size=16, topk=3)
    slopes = torch.tensor([0.5, 1.0, 2.0, 4.0])

    def alibi(score, b, h, row, key):
        return score - slopes[h * 2 + row % 2] * (row // 2 - key)

    mask = create_block_mask(ids, num_heads=4, seqlen_k=48, block_size=16, with_backward=False)
    out = packed_flex_attention(q, k, v, mask, score_mod=alibi)
    distance = torch.arange(48)[:, None] - torch.arange(48)
    bias = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("with_backward", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_lists_hold_every_chosen_block_once(tokens, with_backward):
    inputs = make_inputs(64, num_kv_heads=1)
    ids = flexmsa.select_blocks(inputs.index_q, inputs.index_k, block_size=8, topk=3)
    sequences = torch.tensor([[0, 0, 64, 0, 64]], dtype=torch.int32)
    lists = flexmsa.ops.block_mask_lists(ids, sequences, 64, 8, 8, tokens, 8, True, with_backward)
    partial, full = (
        [set(row[:n].tolist()) for row, n in zip(indices[0, 0], count[0, 0], strict=True)]
        for count, indices in ((lists[0], lists[1]), (lists[2], lists[3]))
    )
    for row in range(64 // tokens):
        chosen = [set(ids[0, 0, t].tolist()) - {-1} for t in range(row * tokens, (row + 1) * tokens)]
        assert partial[row] | full[row] == set.union(*chosen)
        assert partial[row].isdisjoint(full[row])
        assert full[row] == {b for b in set.intersection(*chosen) if (b + 1) * 8 <= row * tokens + 1}
    if with_backward:
        for (count, indices), rows in zip(((lists[4], lists[5]), (lists[6], lists[7])), (partial, full), strict=True):
            for block in range(8):
                listed = indices[0, 0, block, : count[0, 0, block]].tolist()
                assert listed == [row for row, blocks in enumerate(rows) if block in blocks]


def test_what_flex_attention_cannot_do_on_a_cpu_raises():
    inputs = make_inputs(32, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no gradient and no lse"):
        flexmsa.attention(*inputs, block_size=16, topk=1, backend="flex")


@pytest.mark.parametrize(("head_dim", "backend"), [(8, "triton"), (16, "flex")])
def test_the_warm_up_on_a_gpu_takes_it_for_heads_that_it_has_kernels_for(head_dim, backend):
    pytest.importorskip("triton")
    with FakeTensorMode():
        assert dense_backend(None, torch.empty(1, 2, 4, head_dim, device="cuda")) == backend
