"""DTensors in flexmsa's functions: results, loss and gradients are those of the whole plain tensors, in float64."""

from itertools import product

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import flexmsa
from flexmsa import AuxRequest

HEADS, ROWS, WHOLE = Shard(1), Shard(0), Replicate()
NAMES = ("q", "k", "v", "index_q", "index_k")
LENGTHS = {
    "plain": {},
    "packed": {"cu_seqlens": [0, 5, 24]},
    "ragged": {
        # More queries than keys.
        "cu_seqlens_q": [0, 20, 24],
        "cu_seqlens_k": [0, 9, 24],
    },
    "ranges": {"kv_starts": [0, 7, 2, 0], "kv_lens": [24, 20, 11, 0]},
}
EVERYTHING = AuxRequest(lse=True, block_indices=True, index_loss=True, index_loss_sum=True)
SETTINGS = {"block_size": 4, "topk": 2}


def given(lengths):
    """The arguments of these lengths, on the default device."""
    return {name: torch.tensor(values, dtype=torch.int32) for name, values in LENGTHS[lengths].items()}


def inputs(lengths):
    torch.manual_seed(0)
    rows = 1 if lengths in ("packed", "ragged") else 4
    shapes = [(8, 8), (4, 8), (4, 8), (4, 6), (1, 6)]
    return [torch.randn(rows, heads, 24, size, dtype=torch.float64, requires_grad=True) for heads, size in shapes]


def sharded(tensors, mesh, placements):
    """index_k, the last one, has one head, so it is whole where heads are sharded."""
    *heads, index_k = tensors
    whole = [WHOLE if p == HEADS else p for p in placements]
    places = [placements] * len(heads) + [whole]
    return [
        distribute_tensor(x.detach(), mesh, place).requires_grad_()
        for x, place in zip((*heads, index_k), places, strict=True)
    ]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def step(tensors, topk, lengths, in_backward, **more):
    """What attention returns, and the gradients of a weighted sum of it."""
    torch.manual_seed(1)
    weight = torch.randn(tensors[0].shape, dtype=torch.float64)
    if isinstance(tensors[0], DTensor):
        weight = distribute_tensor(weight, tensors[0].device_mesh, tensors[0].placements)
    value = torch.full((), torch.nan, dtype=torch.float64) if in_backward else None
    settings = {"block_size": 4, "topk": topk, "return_aux": EVERYTHING, "index_loss_value": value, **more}
    out, aux = flexmsa.attention(*tensors, **given(lengths), **settings)
    loss = aux.index_loss * 0.7 + aux.index_loss_sum * 0.2
    full((out * weight).sum()).add(full(loss)).backward()
    found = {"out": full(out.detach()), **{name: full(x) for name, x in aux._asdict().items()}, "value": value}
    found.update({f"d {name}": full(x.grad) for name, x in zip(NAMES, tensors, strict=True)})
    return {name: x.detach() for name, x in found.items() if x is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


def check_attention(mesh, placements, topk, lengths, in_backward, **more):
    expected = step(inputs(lengths), topk, lengths, in_backward, **more)
    assert_same(step(sharded(inputs(lengths), mesh, placements), topk, lengths, in_backward, **more), expected)


def check_placements(mesh):
    tensors = sharded(inputs("plain"), mesh, [HEADS])
    out, aux = flexmsa.attention(*tensors, **SETTINGS, return_aux=EVERYTHING)
    (out.sum() + aux.index_loss).backward()
    assert all(x.placements == (HEADS,) for x in (out, aux.lse, aux.block_indices))
    assert aux.index_loss.placements == (Partial(),) == aux.index_loss_sum.placements
    assert aux.index_loss_count == 4 * 4 * 24
    ratio = aux.index_loss_sum.full_tensor() / aux.index_loss_count
    torch.testing.assert_close(ratio, aux.index_loss.full_tensor(), rtol=1e-12, atol=0)
    assert tensors[3].grad.placements == (HEADS,)


def check_steps(mesh):
    """The single steps; k, v and index_q are given whole and are cut."""
    plain = inputs("plain")
    placed = sharded(plain, mesh, [HEADS])
    placed[1:4] = [distribute_tensor(x.detach(), mesh, [WHOLE]).requires_grad_() for x in plain[1:4]]
    found = []
    for q, k, v, index_q, index_k in (plain, placed):
        given_ids = flexmsa.select_blocks(**SETTINGS, index_q=index_q, index_k=index_k)
        out, aux = flexmsa.block_sparse_attention(q, k, v, given_ids, block_size=4, return_aux=AuxRequest(lse=True))
        loss = flexmsa.index_loss(q, k, index_q, index_k, given_ids, aux.lse, block_size=4)
        full((out * out).sum()).backward()
        # Apart, so that q, k and v get no gradient from it.
        full(loss).backward()
        grads = {name: full(x.grad) for name, x in zip(NAMES, (q, k, v, index_q, index_k), strict=True)}
        found.append({"ids": full(given_ids), "out": full(out), "loss": full(loss), **grads})
    assert_same(found[1], found[0])


def check_loss_alone(mesh):
    """A backward of the loss in the backward alone gives q, k and v no gradient."""
    tensors = sharded(inputs("plain"), mesh, [HEADS])
    tensors[1] = distribute_tensor(tensors[1].full_tensor().detach(), mesh, [WHOLE]).requires_grad_()
    value = torch.full((), torch.nan, dtype=torch.float64)
    request = {"return_aux": AuxRequest(index_loss=True), "index_loss_value": value}
    out, aux = flexmsa.attention(*tensors, **SETTINGS, **request)
    full(aux.index_loss).backward(retain_graph=True)
    expected = flexmsa.attention(*inputs("plain"), **SETTINGS, return_aux=AuxRequest(index_loss=True))[1].index_loss
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    # PyTorch 2.11 makes zeros of no gradient where it redistributes.
    assert tensors[1].grad is None or not full(tensors[1].grad).any()
    full(out.sum()).backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def check_refusals(mesh):
    q, k, v, index_q, index_k = sharded(inputs("plain"), mesh, [HEADS])
    with pytest.raises(NotImplementedError, match=r"q: expected sharded heads, .* got S\(2\)|got Shard\(dim=2\)"):
        flexmsa.attention(q.redistribute(placements=[Shard(2)]), k, v, index_q, index_k)
    with pytest.raises(ValueError, match=r"index_k: expected a DTensor on the mesh of the others.* got Tensor"):
        flexmsa.attention(q, k, v, index_q, index_k.full_tensor())
    with pytest.raises(ValueError, match="k: expected a multiple of the 2 processes that share its heads, got 1"):
        flexmsa.attention(q, k[:, :1], v[:, :1], index_q[:, :1], index_k)
    packed = sharded(inputs("plain"), mesh, [ROWS])
    with pytest.raises(ValueError, match="cu_seqlens: expected whole batch rows with packed documents"):
        flexmsa.attention(*packed, **given("packed"))
    value = distribute_tensor(torch.zeros(()), mesh, [WHOLE])
    with pytest.raises(TypeError, match="index_loss_value: expected a plain tensor"):
        request = AuxRequest(index_loss=True)
        flexmsa.attention(q, k, v, index_q, index_k, return_aux=request, index_loss_value=value)


def check_compiled(mesh):
    torch._dynamo.reset()
    attend = torch.compile(flexmsa.attention, fullgraph=True, backend="aot_eager")
    plain = inputs("plain")
    tensors = sharded(plain, mesh, [HEADS])
    found = []
    for function, arguments in ((flexmsa.attention, plain), (attend, tensors)):
        out, aux = function(*arguments, **SETTINGS, return_aux=AuxRequest(index_loss=True))
        full((out * out).sum()).add(full(aux.index_loss)).backward()
        found.append(
            {"out": full(out), "loss": full(aux.index_loss), **{f"{n}": full(arguments[n].grad) for n in range(5)}}
        )
    assert_same(found[1], found[0])


ONE = [("heads", [HEADS]), ("rows", [ROWS]), ("whole", [WHOLE])]
CASES = {
    f"{name} {topk} {lengths}{' in backward' * in_backward}": (check_attention, placements, topk, lengths, in_backward)
    for (name, placements), topk, lengths, in_backward in product(ONE, [2, None], LENGTHS, [False, True])
    if name != "rows" or lengths not in ("packed", "ragged")
}
CASES["reference"] = (lambda mesh: check_attention(mesh, [HEADS], 2, "ranges", False, backend="reference"),)
CASES["a count"] = (lambda mesh: check_attention(mesh, [ROWS], 2, "ranges", False, index_loss_count=50.0),)
CASES.update({check.__name__: (check,) for check in (check_placements, check_steps, check_loss_alone)})
CASES.update({check.__name__: (check,) for check in (check_refusals, check_compiled)})
CASES_OF_FOUR = {
    f"DTensors {placements} {lengths} {in_backward}": (check_attention, placements, 2, lengths, in_backward)
    for placements, lengths, in_backward in (
        ([ROWS, HEADS], "ranges", True),
        ([ROWS, HEADS], "plain", False),
        ([HEADS, HEADS], "packed", True),
        ([ROWS, ROWS], "ranges", False),
        ([WHOLE, HEADS], "ranges", True),
    )
}
