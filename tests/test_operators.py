"""The operators under the compiler, autocast, checkpointing and torch.library's own checks."""

from collections import Counter
from functools import partial

import pytest
import torch
from helpers import lengths, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention, functional, ops, validation

EVERYTHING = AuxRequest(lse=True, block_indices=True, index_loss=True)
SEQUENCES = torch.tensor([[0, 0, 33, 0, 33]], dtype=torch.int32)
CONFIG = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=8, block_size=8, topk=2)


def test_functions_on_meta_tensors():
    tensors = [x.to("meta").requires_grad_() for x in make_inputs(33)]
    value = torch.zeros((), device="meta")
    out, aux = flexmsa.attention(*tensors, block_size=8, topk=2, return_aux=EVERYTHING, index_loss_value=value)
    (out.sum() + aux.index_loss).backward()
    assert out.is_meta and out.shape == tensors[0].shape and all(x.grad.shape == x.shape for x in tensors)
    assert flexmsa.select_blocks(*tensors[3:], block_size=8, topk=2).shape == aux.block_indices.shape


def test_opcheck_of_every_operator():
    q, k, v, index_q, index_k = make_inputs(33, requires_grad=True)
    ids = ops.select_blocks(index_q, index_k, SEQUENCES, 8, 2, 1, 0, "torch")
    out, lse = (x.detach() for x in ops.block_sparse_attention(q, k, v, ids, SEQUENCES, 8, 0.25, "torch"))
    strided = q.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    frozen = [x.detach() for x in (q, k, v, index_q, index_k)]
    main, loss = (SEQUENCES, 8, 0.25), (SEQUENCES, None, 8, 0.25, 0.25)
    opcheck(ops.sequence_table, (q, None, None, lengths(20), 33))
    opcheck(ops.sequence_table, (q, lengths(0, 1, 33), None, None, 33))
    opcheck(ops.sequence_table, (q, lengths(0, 1, 1, 33), None, None, 33, lengths(0, 5, 20, 33)))
    opcheck(ops.fragment_table, (torch.tensor([[[0, 0, 3, 0, 3], [0, 3, 33, 0, 33]]]), 1, 33, 33))
    opcheck(ops.select_blocks, (index_q, index_k, SEQUENCES, 8, 2, 1, 0, "torch"))
    opcheck(ops.scored_blocks, (index_q, index_k, SEQUENCES, 8, 2, "torch"))
    wide = [x.detach().double() for x in (index_q, index_k)]
    opcheck(ops.scored_blocks, (*wide, SEQUENCES, 8, 9, "torch"))
    for indices in (ids, None):
        opcheck(ops.block_sparse_attention, (strided, k, v, indices, *main, "torch"))
        opcheck(ops.block_sparse_attention_backward, (out, lse, *frozen[:3], out, lse, indices, *main, "torch"))
        for with_grad in (True, False):
            branches = (index_q, index_k) if with_grad else frozen[3:]
            arguments = (*frozen[:2], *branches, indices, lse, *loss, with_grad, "torch")
            opcheck(ops.index_loss, arguments)
    opcheck(ops.index_loss_backward, (torch.ones(()), out, torch.float16))
    for indices in (ids, None):
        opcheck(ops.attend_blocks, (*frozen[:3], indices, SEQUENCES, 8, 0.25, "torch", None, None, None, out))
    opcheck(ops.pack_gqa, (strided, 2))
    opcheck(ops.unpack_gqa, (ops.pack_gqa(frozen[0], 2).requires_grad_(), 6))
    opcheck(ops.block_mask_lists, (ids, SEQUENCES, 33, 8, 8, 2, 5, True, True))
    opcheck(ops.block_mask_lists, (ids, SEQUENCES, 33, 8, 16, 4, 3, False, False))
    opcheck(ops.dense_mask_lists, (SEQUENCES, 1, 33, 33, 16, 8, True))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_opcheck_of_the_cache_operators(paged, dtype):
    new = make_inputs(5, batch=2)
    sizes = (2, 2, 16, 16)
    cache = (
        flexmsa.PagedMSACache(*sizes, num_pages=6, max_pages=3, page_size=8, dtype=dtype)
        if paged
        else flexmsa.MSACache(*sizes, capacity=24, dtype=dtype)
    )
    for lens in (None, lengths(5, 2)):
        cache.append(new.k, new.v, new.index_k, lens=lens)
    if paged:
        cache.reserve(24)
    # The check of the schema multiplies its inputs, which PyTorch cannot do in e4m3.
    everything = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    check = partial(opcheck, test_utils=everything[dtype.itemsize == 1 :])
    table = cache.newest(5)
    buffers = (cache.k, cache.v, cache.index_k, cache.k_scale, cache.v_scale, cache.index_k_scale, cache.page_table)
    state = (cache.kv_starts, cache.kv_lens, torch.zeros(4, 5, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    check(ops.next_positions, (cache.kv_lens, cache.kv_starts, 3))
    check(ops.append, (new.k, new.v, new.index_k, lengths(3, 4), *buffers, *state, "torch"))
    ids = ops.select_blocks(
        new.index_q, cache.index_k, table, 8, 2, 1, 0, "torch", cache.page_table, cache.index_k_scale
    )
    stored = (cache.page_table, cache.index_k_scale)
    check(ops.scored_blocks, (new.index_q, cache.index_k, table, 8, 2, "torch", *stored))
    scales = (cache.page_table, cache.k_scale, cache.v_scale)
    out = torch.empty_like(new.q)
    check(ops.attend_blocks, (new.q, cache.k, cache.v, ids, table, 8, 0.25, "torch", *scales, out))
    branches = (new.q, new.index_q, cache.k, cache.v, cache.index_k, table)
    rest = (8, 1, 0, 0.25, "torch", *scales, cache.index_k_scale, out, ids)
    check(ops.select_and_attend, (*branches, *rest))


def _graphs(counter: CompileCounterWithBackend) -> int:
    return sum(1 for graph in counter.graphs if len(graph.graph.nodes) > 0)


@pytest.mark.parametrize("topk", [2, None])
def test_the_layer_is_one_graph_for_every_length(topk):
    layer = MSAttention(CONFIG)
    layer.topk = topk
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (24, 33, 61, 128):
        x = torch.randn(2, seqlen, 32, requires_grad=True)
        results = []
        for run in (compiled, layer):
            out, loss = run(x)
            results.append((out, loss, *torch.autograd.grad(out.sum() + loss, [x, *layer.parameters()])))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
    assert _graphs(counter) == 1


def test_packed_documents_are_one_graph_for_every_count():
    def step(*inputs):
        *tensors, cu_seqlens = inputs
        out, aux = flexmsa.attention(*tensors, block_size=8, topk=2, cu_seqlens=cu_seqlens, return_aux=EVERYTHING)
        return out, aux.index_loss

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for seqlen, offsets in ((40, (0, 3, 40)), (57, (0, 1, 2, 50, 57)), (90, (0, 8, 90))):
        inputs = make_inputs(seqlen, requires_grad=True)
        out, loss = compiled(*inputs, lengths(*offsets))
        (out.sum() + loss).backward()
        torch.testing.assert_close((out, loss), step(*inputs, lengths(*offsets)))
    assert _graphs(counter) == 1


def test_inductor_compiles_the_layer_whole():
    layer = MSAttention(CONFIG)
    x = torch.randn(1, 20, 32)
    out, loss = torch.compile(layer, fullgraph=True)(x)
    (out.sum() + loss).backward()
    torch.testing.assert_close((out, loss), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_inductor_compiles_a_step_on_a_cache(dtype):
    caches = [flexmsa.MSACache(2, 2, 16, 16, capacity=24, dtype=dtype) for _ in range(2)]

    def step(cache, new):
        cache.append(new.k, new.v, new.index_k)
        return flexmsa.decode(new.q, cache, new.index_q, block_size=8, topk=2)

    compiled = torch.compile(step, fullgraph=True)
    for seed in (0, 1):
        new = make_inputs(5, batch=2, seed=seed)
        assert torch.equal(compiled(caches[0], new), step(caches[1], new))
    assert all(torch.equal(x, y) for x, y in zip(*(cache.contiguous() for cache in caches), strict=True))


@pytest.mark.parametrize("policy", [None, flexmsa.save_selection_policy, flexmsa.save_attention_policy])
def test_checkpointing_gives_the_same_gradients(policy):
    layer = MSAttention(CONFIG)
    x = torch.randn(2, 50, 32, requires_grad=True)
    out, loss = layer(x)
    expected = torch.autograd.grad(out.sum() + loss, [x, *layer.parameters()])
    settings = {}
    if policy is not None:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    out, loss = checkpoint(layer, x, use_reentrant=False, **settings)
    found = torch.autograd.grad(out.sum() + loss, [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    ("policy", "repeats"), [(flexmsa.save_selection_policy, 2), (flexmsa.save_attention_policy, 1)]
)
def test_selective_checkpointing_selects_once(policy, repeats, in_backward, monkeypatch):
    from flexmsa.kernels import torch as torch_kernels

    calls = {"select_blocks": 0, "attend_blocks": 0, "index_loss": 0}
    for name in calls:
        kernel = getattr(torch_kernels, name)

        def counted(*args, name=name, kernel=kernel):
            calls[name] += 1
            return kernel(*args)

        monkeypatch.setattr(torch_kernels, name, counted)
    layer = MSAttention(MSAConfig(**{**vars(CONFIG), "loss_in_backward": in_backward}))
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out, loss = checkpoint(layer, torch.randn(1, 30, 32), use_reentrant=False, context_fn=contexts)
    (out.sum() + loss).backward()
    expected = {"select_blocks": 1, "attend_blocks": repeats}
    assert calls == expected | {"index_loss": 0 if in_backward else repeats}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_follows_the_dtype_of_the_region(dtype, compiled):
    inputs = make_inputs(40, requires_grad=True)
    mixed = inputs._replace(q=inputs.q.to(dtype))

    def run(*tensors):
        return flexmsa.attention(*tensors, block_size=8, topk=2, return_aux=EVERYTHING)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        out, aux = run(*mixed)
        assert out.dtype == dtype and aux.lse.dtype == aux.index_loss.dtype == torch.float32
        (out.float().sum() + aux.index_loss).backward()
    expected = run(*(x.to(dtype) for x in inputs))
    torch.testing.assert_close((out, aux.lse), (expected[0], expected[1].lse))
    assert all(x.grad.dtype == torch.float32 for x in inputs[1:])


def test_autocast_reaches_an_operator_called_by_itself():
    _, _, _, index_q, index_k = make_inputs(33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.ops.flexmsa.select_blocks(index_q, index_k, SEQUENCES, 8, 2, 1, 0, "torch")
    half = index_q.bfloat16(), index_k.bfloat16()
    assert torch.equal(found, torch.ops.flexmsa.select_blocks(*half, SEQUENCES, 8, 2, 1, 0, "torch"))


@pytest.mark.parametrize("topk", [2, None])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_attention_checks_its_input_and_makes_its_table_once(monkeypatch, topk, backend):
    calls: Counter[str] = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    checks = ["reject_forward_ad", *(f"check_{x}" for x in ("main_inputs", "index_inputs", "branches_match"))]
    checks += ["check_settings", "check_aux"]
    for name in checks:
        count(validation, name)
    count(functional, "check_sequences")
    count(ops, "sequence_table")
    flexmsa.attention(*make_inputs(20), block_size=8, topk=topk, backend=backend, return_aux=EVERYTHING)
    assert calls == dict.fromkeys([*checks, "check_sequences", "sequence_table"], 1)


def test_forward_mode_raises():
    q, k, v, index_q, index_k = make_inputs(16)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: flexmsa.attention(q, k, v, index_q, index_k), (q,), (q,))


def test_a_loss_scale_does_not_lose_small_gradients():
    inputs = [x.half().requires_grad_() for x in make_inputs(64)]
    scale = 2.0**12
    _, aux = flexmsa.attention(*inputs, block_size=8, topk=2, return_aux=EVERYTHING)
    scaled = torch.autograd.grad(aux.index_loss * scale, inputs[3])[0].double() / scale
    wide = [x.detach().double().requires_grad_() for x in inputs]
    _, aux = flexmsa.attention(*wide, block_size=8, topk=2, return_aux=EVERYTHING)
    exact = torch.autograd.grad(aux.index_loss, wide[3])[0]
    assert (scaled - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("topk", [2, None])
def test_gradients_in_float64_are_those_of_finite_differences(topk):
    inputs = make_inputs(11, group_size=2, head_dim=3, dtype=torch.float64, requires_grad=True)
    ids = flexmsa.select_blocks(*inputs[3:], block_size=4, topk=topk) if topk else None

    def main_branch(q, k, v):
        out, aux = flexmsa.block_sparse_attention(q, k, v, ids, block_size=4, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    _, lse = (x.detach() for x in main_branch(*inputs[:3]))

    def loss(index_q, index_k):
        return flexmsa.index_loss(*inputs[:2], index_q, index_k, ids, lse, block_size=4)

    assert torch.autograd.gradcheck(main_branch, inputs[:3])
    assert torch.autograd.gradcheck(loss, inputs[3:])


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, index_q, index_k):
            return flexmsa.attention(q, k, v, index_q, index_k, block_size=8, topk=2)

    inputs = make_inputs(40)
    program = torch.export.export(Model(), tuple(inputs))
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))
