"""The index loss that the backward computes has the gradients and the value of the one that the forward computes."""

import copy
from functools import partial

import pytest
import torch
from helpers import make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention, ops

LOSS = AuxRequest(lse=True, index_loss=True)
CONFIG = MSAConfig(
    32, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=8, block_size=8, topk=2, loss_in_backward=True
)
COMBINATIONS = {
    "both": lambda out, aux: out.square().sum() + 3 * aux.index_loss,
    "lse and loss": lambda out, aux: aux.lse.sin().sum() - 0.5 * aux.index_loss,
    "out": lambda out, aux: out.square().sum(),
    "loss": lambda out, aux: 2 * aux.index_loss,
}


def nan() -> torch.Tensor:
    return torch.full((), torch.nan)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("topk", [2, None])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_gradients_and_value(combination, topk, backend):
    inputs = make_inputs(40, batch=2, requires_grad=True)
    settings = {"block_size": 8, "topk": topk, "backend": backend, "return_aux": LOSS}
    value, found = nan(), {}
    for target in (None, value):
        out, aux = flexmsa.attention(*inputs, **settings, index_loss_value=target)
        grads = torch.autograd.grad(COMBINATIONS[combination](out, aux), inputs, materialize_grads=True)
        found[target] = aux.index_loss.detach(), grads
    (loss, expected), (zero, grads) = found[None], found[value]
    assert zero == 0
    torch.testing.assert_close(grads, expected)
    if combination == "out" and backend is None:
        assert value.isnan()
    else:
        torch.testing.assert_close(value, loss)


@pytest.mark.parametrize("frozen", [slice(0, 3), slice(3, 5), slice(3, 4)])
def test_frozen_inputs_get_no_gradient(frozen):
    inputs = make_inputs(40, requires_grad=True)
    for x in inputs[frozen]:
        x.requires_grad_(False)
    trained = [x for x in inputs if x.requires_grad]
    found = []
    for value in (None, nan()):
        out, aux = flexmsa.attention(*inputs, block_size=8, topk=2, return_aux=LOSS, index_loss_value=value)
        found.append(torch.autograd.grad(out.sum() + aux.index_loss, trained))
    torch.testing.assert_close(*found)


def step(layer, x, run=None):
    """Gradients of the layer's parameters and x, and the layer's loss."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    out, loss = (run or layer)(x)
    (out.sin().sum() + 0.1 * loss).backward()
    value = layer.index_loss_value if layer.config.loss_in_backward else loss.detach()
    return [x.grad, value.clone(), *(p.grad for p in layer.parameters())]


@pytest.fixture
def layers():
    """A layer whose backward computes the loss, and its copy whose forward does."""
    layer = MSAttention(CONFIG)
    other = MSAttention(MSAConfig(**{**vars(CONFIG), "loss_in_backward": False}))
    other.load_state_dict(layer.state_dict())
    return layer, other


def test_the_value_is_no_part_of_the_state(layers):
    layer, _ = layers
    assert layer.index_loss_value.isnan()
    assert "index_loss_value" not in layer.state_dict()
    assert copy.deepcopy(layer).bfloat16().index_loss_value.dtype == torch.float32


@pytest.mark.parametrize("topk", [2, None])
@pytest.mark.parametrize("mode", ["eager", "reentrant", "checkpointed", "selection", "attention"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_layer_under_checkpointing_and_the_compiler(layers, topk, mode, compiled):
    layer, other = layers
    layer.topk = other.topk = topk
    x = torch.randn(2, 40, 32)
    policies = {"selection": flexmsa.save_selection_policy, "attention": flexmsa.save_attention_policy}
    settings = {
        "reentrant": {"use_reentrant": True},
        "checkpointed": {"use_reentrant": False},
        **{
            name: {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}
            for name, policy in policies.items()
        },
    }

    def run(x):
        return layer(x) if mode == "eager" else checkpoint(layer, x, **settings[mode])

    if compiled:
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(run, fullgraph=True, backend=counter)
    torch.testing.assert_close(step(layer, x, run), step(other, x))


def test_validation_computes_the_loss_in_the_forward(layers):
    layer, other = layers
    x = torch.randn(1, 40, 32)
    layer.eval()
    torch.testing.assert_close(layer(x, with_index_loss=True), other(x))


def test_two_forwards_before_their_backwards(layers):
    layer, other = layers
    x = torch.randn(2, 3, 40, 32)
    losses = [sum(layer(part)) for part in x]
    for loss, part in zip(losses, x, strict=True):
        loss.sum().backward()
        torch.testing.assert_close(layer.index_loss_value, other(part)[1].detach())


def test_scaled_losses_do_not_underflow_and_the_value_is_not_scaled():
    inputs = make_inputs(40, requires_grad=True, dtype=torch.float16)
    value = nan()
    settings = {"block_size": 8, "topk": 2, "return_aux": LOSS}
    out, aux = flexmsa.attention(*inputs, **settings, index_loss_value=value)
    scaled = torch.autograd.grad(out.sum() + aux.index_loss * 2.0**14, inputs[3])[0].double() / 2.0**14
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, aux = flexmsa.attention(*wide, **settings)
    exact = torch.autograd.grad(aux.index_loss, wide[3])[0]
    torch.testing.assert_close(scaled, exact, atol=2e-3 * exact.abs().max().item(), rtol=2e-3)
    torch.testing.assert_close(value.double(), aux.index_loss.detach(), atol=1e-3, rtol=1e-3)


def test_opcheck():
    inputs = make_inputs(33, requires_grad=True)
    q, k, _, index_q, index_k = (x.detach() for x in inputs)
    table = torch.tensor([[0, 0, 33, 0, 33]], dtype=torch.int32)
    ids = ops.select_blocks(index_q, index_k, table, 8, 2, 1, 0, "torch")
    numbers = 8, 0.25, 0.25, "torch"
    opcheck(torch.ops.flexmsa.attention_and_index_loss.default, (*inputs, ids, table, None, nan(), *numbers))
    out, lse = ops.block_sparse_attention(*(x.detach() for x in inputs[:3]), ids, table, 8, 0.25, "torch")
    detached = [x.detach() for x in inputs]
    gradients = torch.randn_like(out), lse.cos(), torch.tensor(2.0)
    backward = torch.ops.flexmsa.attention_and_index_loss_backward.default
    opcheck(backward, (*gradients, *detached, out, lse, ids, table, torch.tensor(40), *numbers))
    for indices in (ids, None):
        branches = q, k, *inputs[3:], indices, lse, table, None, nan()
        opcheck(torch.ops.flexmsa.deferred_index_loss.default, (*branches, *numbers))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1), "expected a float32 scalar"),
        (torch.zeros((), dtype=torch.bfloat16), "expected a float32 scalar"),
        (torch.zeros((), device="meta"), "expected on cpu"),
    ],
)
def test_wrong_tensors_for_the_value(value, message):
    with pytest.raises(ValueError, match=f"index_loss_value: {message}"):
        flexmsa.attention(*make_inputs(8), block_size=8, topk=1, return_aux=LOSS, index_loss_value=value)
    with pytest.raises(ValueError, match="index_loss_value: expected None without a request"):
        flexmsa.attention(*make_inputs(8), block_size=8, topk=1, index_loss_value=value)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("topk", [2, None])
def test_without_a_backward_no_value_is_wrong(topk, backend):
    """With a frozen index branch the forward computes it. In no_grad nothing does: an earlier value does not stay."""
    settings = {"block_size": 8, "topk": topk, "backend": backend, "return_aux": LOSS}
    plain, trained = make_inputs(40), make_inputs(40, requires_grad=True)
    expected = flexmsa.attention(*plain, **settings)[1].index_loss
    for inputs in (plain, (*trained[:3], *plain[3:])):
        value = nan()
        loss = flexmsa.attention(*inputs, **settings, index_loss_value=value)[1].index_loss
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(loss, expected)
        assert not loss.requires_grad
    with torch.no_grad():
        zero = flexmsa.attention(*trained, **settings, index_loss_value=value)[1].index_loss
    assert zero == 0 and value.isnan()


def test_the_value_is_float32_whatever_the_default_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MSAttention(CONFIG)
        sum(layer(torch.randn(1, 20, 32))).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.index_loss_value.dtype == torch.float32 and layer.index_loss_value.isfinite()


@pytest.mark.parametrize("deferred", [False, True])
def test_vmap(deferred):
    """Inside vmap, tensors do not say that they need a gradient."""

    def loss(value, *tensors):
        wanted, alone = AuxRequest(index_loss=True), (x[None] for x in tensors)
        return flexmsa.attention(*alone, block_size=4, topk=3, return_aux=wanted, index_loss_value=value)[1].index_loss

    tensors = make_inputs(40, batch=2, requires_grad=True)
    values = torch.full((2,), torch.nan)
    found = torch.vmap(loss, in_dims=(0 if deferred else None, *[0] * 5))(values if deferred else None, *tensors)
    grads = torch.autograd.grad(found.sum(), tensors[3:])
    expected = torch.autograd.grad(sum(loss(None, *row) for row in zip(*tensors, strict=True)), tensors[3:])
    torch.testing.assert_close(grads, expected)
