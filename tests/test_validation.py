"""Bad input raises, and says which argument, what was expected and what came."""

import pytest
import torch
from helpers import lengths, make_inputs

import flexmsa
from flexmsa import AuxRequest, MSAConfig
from flexmsa._sequences import Sequences


def _attend(change=None, **settings):
    inputs = make_inputs(40)._asdict()
    inputs.update({name: make(inputs[name]) for name, make in (change or {}).items()})
    return flexmsa.attention(**inputs, **{"block_size": 8, "topk": 2, **settings})


BAD_TENSORS = [
    ({"q": lambda x: x[0]}, ValueError, r"q: expected 4 dimensions .* got 3"),
    ({"q": lambda x: x[:, :5]}, ValueError, r"q: expected heads in groups"),
    ({"q": lambda x: x[..., :8]}, ValueError, r"k: expected .* got"),
    ({"q": lambda x: x[:, :, :0]}, ValueError, r"at least one query"),
    ({"k": lambda x: x.expand(2, -1, -1, -1)}, ValueError, r"k: expected"),
    ({"v": lambda x: x[:, :, 1:]}, ValueError, r"v: expected the shape of k"),
    ({"v": lambda x: x.double()}, TypeError, r"v: expected the dtype of q, torch.float32, got torch.float64"),
    ({"k": lambda x: x.int()}, TypeError, r"k: expected a floating dtype, got torch.int32"),
    ({"v": lambda x: x.to("meta")}, ValueError, r"v: expected the device of q, cpu, got meta"),
    ({"v": lambda x: x.numpy()}, TypeError, r"v: expected a tensor .* got ndarray"),
    ({"index_q": lambda x: x[:, :1]}, ValueError, r"index_q: expected \[B, Hkv, Sq, Di\]"),
    ({"index_q": lambda x: x[:, :, 1:]}, ValueError, r"index_q: expected"),
    ({"index_k": lambda x: x.expand(-1, 2, -1, -1)}, ValueError, r"index_k: expected .* one head for all groups"),
    ({"index_k": lambda x: x[..., 1:]}, ValueError, r"index_k: expected"),
    ({"index_q": lambda x: x.to(torch.float8_e4m3fn)}, TypeError, r"index_q: expected .* 16 bits or more, got"),
]
RAGGED = {"cu_seqlens_q": lengths(0, 40), "cu_seqlens_k": lengths(0, 40)}
BAD_SETTINGS = [
    ({"topk": 0}, ValueError, r"topk: expected an int >= 1, got 0"),
    ({"topk": 2.0}, TypeError, r"topk: expected an int, got float"),
    ({"topk": True}, TypeError, r"topk: expected an int, got bool"),
    ({"block_size": 0}, ValueError, r"block_size: expected an int >= 1"),
    ({"num_local_blocks": 0}, ValueError, r"num_local_blocks: .* own block is always selected"),
    ({"num_init_blocks": 2}, ValueError, r"topk: expected room for the 1 local and 2 initial blocks"),
    ({"scale": "1"}, TypeError, r"scale: expected a float"),
    ({"index_scale": "1"}, TypeError, r"index_scale: expected a float"),
    ({"backend": "fast"}, ValueError, r"backend: expected None or one of"),
    ({"backend": "triton"}, NotImplementedError, r"runs on CUDA tensors, got cpu: use backend=None"),
    ({"cu_seqlens": lengths(40)}, ValueError, r"cu_seqlens: expected \[documents \+ 1\]"),
    ({"cu_seqlens": lengths(0, 20)}, ValueError, r"cu_seqlens: expected offsets from 0 to .* 40, got 0 to 20"),
    ({"cu_seqlens": lengths(1, 40)}, ValueError, r"cu_seqlens: expected offsets from 0"),
    ({"cu_seqlens": lengths(0, 20, 10, 40)}, ValueError, r"cu_seqlens: expected rising offsets, got 20 then 10"),
    ({"cu_seqlens_q": lengths(0, 40)}, ValueError, r"expected both or neither, got no cu_seqlens_k"),
    ({"cu_seqlens_k": lengths(0, 40)}, ValueError, r"expected both or neither, got no cu_seqlens_q"),
    ({**RAGGED, "cu_seqlens": lengths(0, 40)}, ValueError, r"either cu_seqlens, or cu_seqlens_q and cu_seqlens_k"),
    ({**RAGGED, "cu_seqlens_k": lengths(0, 9, 40)}, ValueError, r"one offset more than documents each, got 2 and 3"),
    ({**RAGGED, "cu_seqlens_q": lengths(0, 41)}, ValueError, r"cu_seqlens_q: expected offsets from 0 to .* 40, got"),
    ({**RAGGED, "cu_seqlens_k": lengths(0, 39)}, ValueError, r"cu_seqlens_k: expected offsets from 0 to .* 40, got"),
    ({**RAGGED, "cu_seqlens_q": lengths(0)}, ValueError, r"cu_seqlens_q: expected \[documents \+ 1\]"),
    ({**RAGGED, "kv_lens": lengths(40)}, ValueError, r"cu_seqlens_q: expected alone"),
    ({"cu_seqlens": lengths(0, 40).float()}, TypeError, r"cu_seqlens: expected int32"),
    ({"cu_seqlens": [0, 40]}, TypeError, r"cu_seqlens: expected a tensor, got list"),
    ({"cu_seqlens": lengths(0, 40), "kv_lens": lengths(40)}, ValueError, r"cu_seqlens: expected alone"),
    ({"kv_lens": lengths(40, 40)}, ValueError, r"kv_lens: expected \[B\]"),
    ({"kv_lens": lengths(41)}, ValueError, r"kv_starts <= kv_lens <= 40 .* got kv_starts=0, kv_lens=41 in batch row 0"),
    ({"kv_starts": lengths(-1)}, ValueError, r"0 <= kv_starts"),
    ({"kv_starts": lengths(30), "kv_lens": lengths(20)}, ValueError, r"kv_starts <= kv_lens"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_TENSORS)
def test_a_bad_tensor_is_named(change, error, message):
    with pytest.raises(error, match=message):
        _attend(change)


@pytest.mark.parametrize(("settings", "error", "message"), BAD_SETTINGS)
def test_a_bad_setting_is_named(settings, error, message):
    with pytest.raises(error, match=message):
        _attend(**settings)


def test_documents_of_fewer_queries_than_keys_say_so():
    inputs = make_inputs(40).rows(slice(20, 40), slice(None))
    with pytest.raises(ValueError, match=r"as many queries as keys, got Sq=20, Sk=40; pass cu_seqlens_q and cu_seql"):
        flexmsa.attention(*inputs, cu_seqlens=lengths(0, 40))


BAD_FRAGMENTS = [
    # Two fragments of one document of 8 keys, 2 and 2 queries; then each with one thing wrong.
    (lambda x: x[:, 0], r"fragments: expected \[documents, fragments, 5\], got \[1, 5\]"),
    (lambda x: x.flip(1), r"whose queries ascend without gaps"),
    (lambda x: x + torch.tensor([0, 0, 0, 1, 1]) * torch.tensor([[0], [1]]), r"one batch row and k_start per document"),
    (lambda x: x - torch.tensor([0, 0, 0, 0, 5]) * torch.tensor([[0], [1]]), r"see ever more keys; got .*, 0, 3\]"),
    (lambda x: x + torch.tensor([0, 0, 0, 0, 1]), r"see ever more keys; got \[0, 2, 4, 0, 9\]"),
    (lambda x: x + torch.tensor([1, 0, 0, 0, 0]), r"got batch row 1 and k_start 0 for document 0"),
    (lambda x: x.repeat(2, 1, 1), r"got batch row 0 and k_start 0 for document 1"),
    (lambda x: x[:, :1], r"expected each of 1 x 4 queries in one row, got 2"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FRAGMENTS)
def test_a_bad_table_of_fragments_is_named(change, message):
    good = torch.tensor([[[0, 0, 2, 0, 3], [0, 2, 4, 0, 8]]], dtype=torch.int32)
    q = torch.empty(1, 1, 4, 16)
    Sequences.from_table(q, 8, good)
    with pytest.raises(ValueError, match=message):
        Sequences.from_table(q, 8, change(good))


BAD_INDICES = [
    (lambda ids: ids.float(), TypeError, r"block_indices: expected int32 or int64, got torch.float32"),
    (lambda ids: ids[:, :1], ValueError, r"block_indices: expected \[B, Hkv, Sq, topk\]"),
    (lambda ids: ids[0], ValueError, r"block_indices: expected \[B, Hkv, Sq, topk\]"),
    (lambda ids: ids - 2, ValueError, r"block_indices: expected ids from -1 \(no block\) to 4"),
    (lambda ids: ids + 5, ValueError, r"block_indices: expected ids from -1 \(no block\) to 4"),
    (lambda ids: ids.tolist(), TypeError, r"block_indices: expected a tensor, got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INDICES)
def test_bad_block_indices_are_named(change, error, message):
    q, k, v, index_q, index_k = make_inputs(40)
    ids = flexmsa.select_blocks(index_q, index_k, block_size=8, topk=2)
    _, aux = flexmsa.block_sparse_attention(q, k, v, ids, block_size=8, return_aux=AuxRequest(lse=True))
    bad = change(ids)
    with pytest.raises(error, match=message):
        flexmsa.block_sparse_attention(q, k, v, bad, block_size=8)
    with pytest.raises(error, match=message):
        flexmsa.index_loss(q, k, index_q, index_k, bad, aux.lse, block_size=8)


def test_a_bad_lse_is_named():
    q, k, _, index_q, index_k = make_inputs(40)
    with pytest.raises(ValueError, match=r"lse: expected \[B, Hq, Sq\]"):
        flexmsa.index_loss(q, k, index_q, index_k, None, torch.zeros(1, 2, 40))
    with pytest.raises(TypeError, match=r"lse: expected float32"):
        flexmsa.index_loss(q, k, index_q, index_k, None, torch.zeros(1, 6, 40).half())


def _compiled(fullgraph, **settings):
    def step(*tensors):
        return flexmsa.attention(*tensors, **{"block_size": 8, "topk": 2, **settings})

    return torch.compile(step, fullgraph=fullgraph, backend="eager")(*make_inputs(40))


@pytest.mark.parametrize("settings", [{"cu_seqlens": lengths(0, 20, 10, 40)}, {"kv_lens": lengths(99)}])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_bad_values_raise_the_same_under_compile(settings, fullgraph):
    with pytest.raises(ValueError, match="expected"):
        _compiled(fullgraph, **settings)


def test_bad_settings_raise_under_compile():
    message = "topk: expected an int >= 1, got 0"
    with pytest.raises(ValueError, match=message):
        _compiled(False, topk=0)
    torch._dynamo.reset()
    # With fullgraph=True the compiler puts an error of its own round ours.
    with pytest.raises(Exception, match=message):
        _compiled(True, topk=0)


BAD_CONFIGS = [
    ({"num_heads": 5}, r"num_heads: expected a multiple of num_kv_heads=2, got 5"),
    ({"hidden_size": 0}, r"hidden_size: expected an int >= 1"),
    ({"rotary_dim": 3}, r"rotary_dim: expected an even number from 0 to 8"),
    ({"rotary_dim": 16}, r"rotary_dim: expected an even number from 0 to 8"),
    ({"topk": 0}, r"topk: expected an int >= 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS)
def test_a_bad_config_is_named(change, message):
    good = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "index_head_dim": 8}
    MSAConfig(**good)
    with pytest.raises(ValueError, match=message):
        MSAConfig(**{**good, **change})
