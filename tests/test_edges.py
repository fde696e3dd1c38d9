"""What went wrong silently, or with an error that did not help, raises and says what to do."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import assert_refused, lengths, make_inputs

import flexmsa
from flexmsa import AuxRequest, MSACache, MSAConfig, MSAttention, PagedMSACache
from flexmsa.testing import assert_close

CONFIG = MSAConfig(32, num_heads=6, num_kv_heads=2, head_dim=16, index_head_dim=8, block_size=8, topk=3)
WITH_LOSS = AuxRequest(index_loss=True)


def new_tokens(count, requires_grad=False, batch=2):
    return [torch.randn(batch, h, count, d, requires_grad=requires_grad) for h, d in ((2, 16), (2, 16), (1, 8))]


def caches():
    yield MSACache(2, 2, 16, 8, capacity=32)
    yield PagedMSACache(2, 2, 16, 8, num_pages=8, max_pages=4, page_size=8)


@pytest.mark.parametrize("training", [True, False])
def test_a_cached_call_does_not_lose_gradients(training):
    layer = MSAttention(CONFIG).train(training)
    x, cache = torch.randn(2, 5, 32), layer.new_cache(2, 32)
    advice = "expected no gradient with a cache.*torch.no_grad"
    assert_refused(cache, lambda: layer(x, cache=cache), advice, RuntimeError)
    assert_refused(cache, lambda: layer.generate(x, cache), advice, RuntimeError)
    with torch.no_grad():
        expected, _ = layer(x, cache=layer.new_cache(2, 32))
    with torch.inference_mode():
        assert torch.equal(layer(x, cache=layer.new_cache(2, 32))[0], expected)
    layer.requires_grad_(False)
    assert torch.equal(layer(x, cache=cache)[0], expected)
    # Gradients that a call does not lose.
    layer.o_proj.requires_grad_(True)
    out, _ = layer(x, cache=layer.new_cache(2, 32))
    out.sum().backward()
    assert layer.o_proj.weight.grad.any()


def test_a_compiled_cached_call_does_not_lose_gradients():
    layer = MSAttention(CONFIG)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(Exception, match="expected no gradient with a cache"):
        compiled(torch.randn(2, 5, 32), cache=layer.new_cache(2, 32))
    with torch.no_grad():
        compiled(torch.randn(2, 5, 32), cache=layer.new_cache(2, 32))


def test_append_and_decode_do_not_lose_gradients():
    for cache in caches():
        for place, name in enumerate(("k", "v", "index_k")):
            tokens = new_tokens(4)
            tokens[place].requires_grad_()
            assert_refused(cache, partial(cache.append, *tokens), f"^{name}: expected no gradient", RuntimeError)
            with torch.no_grad():
                cache.append(*tokens)
            cache.trim(4)
        cache.append(*new_tokens(4))
        q, index_q = torch.randn(2, 4, 4, 16, requires_grad=True), torch.randn(2, 2, 4, 8, requires_grad=True)
        settings = {"block_size": 8, "topk": 2}
        with pytest.raises(RuntimeError, match=r"^q, index_q: expected no gradient with a cache"):
            flexmsa.decode(q, cache, index_q, **settings)
        assert not flexmsa.decode(q.detach(), cache, index_q.detach(), **settings).requires_grad
        with torch.no_grad():
            flexmsa.decode(q, cache, index_q, **settings)


def test_a_checkpoint_has_the_phase():
    warm_up, sparse, other = (MSAttention(CONFIG) for _ in range(3))
    warm_up.topk, other.topk = None, 2
    sparse.load_state_dict(warm_up.state_dict())
    assert sparse.topk is None
    # The number of blocks is the layer's own, where it has one.
    sparse.load_state_dict(other.state_dict())
    assert sparse.topk == CONFIG.topk
    other.load_state_dict(sparse.state_dict())
    assert other.topk == 2
    dense = MSAttention(MSAConfig(**{**vars(CONFIG), "topk": None}))
    dense.load_state_dict(other.state_dict())
    assert dense.topk == 2


@pytest.mark.parametrize("topk", [None, 2])
def test_a_checkpoint_without_the_phase_leaves_that_of_the_layer(topk):
    old = {name: x for name, x in MSAttention(CONFIG).state_dict().items() if "extra_state" not in name}
    layer = MSAttention(CONFIG)
    layer.topk = topk
    assert not any(layer.load_state_dict(old))
    assert layer.topk == topk
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def test_the_phase_is_saved_as_a_tensor(tmp_path):
    """Formats such as safetensors take nothing else."""
    model = torch.nn.Sequential(MSAttention(CONFIG))
    model[0].topk = None
    assert all(isinstance(x, torch.Tensor) for x in model.state_dict().values())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.nn.Sequential(MSAttention(CONFIG))
    loaded.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert loaded[0].topk is None


def test_the_phase_is_shown_and_checked():
    layer = MSAttention(CONFIG)
    assert "topk=3, block_size=8, phase='sparse'" in repr(layer)
    layer.topk = None
    assert "topk=None, block_size=8, phase='dense warm-up'" in repr(layer)
    for wrong, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="topk: expected"):
            layer.topk = wrong
    assert layer.topk is None


@pytest.mark.parametrize("lens", [(5, 2), (1, -1)])
def test_a_number_of_new_tokens_out_of_range(lens):
    for cache in caches():
        cache.append(*new_tokens(3))
        message = rf"lens: expected 0 to 4, got {lens[0] if lens[0] > 4 else lens[1]} in row {int(lens[0] <= 4)}"
        assert_refused(cache, lambda cache=cache: cache.append(*new_tokens(4), lens=lengths(*lens)), message)
        compiled = torch.compile(cache.append, backend="eager")
        with pytest.raises(ValueError, match=message):
            compiled(*new_tokens(4), lens=lengths(*lens))
    layer = MSAttention(CONFIG).requires_grad_(False)
    cache = layer.new_cache(2, 32)
    assert_refused(cache, lambda: layer(torch.randn(2, 4, 32), cache=cache, lens=lengths(*lens)), message)


@pytest.mark.parametrize("rows", [(0, 2), (-1, 0)])
def test_rows_to_reorder_that_there_are_not(rows):
    for cache in caches():
        cache.append(*new_tokens(3))
        assert_refused(cache, lambda cache=cache: cache.reorder(torch.tensor(rows)), r"^rows: expected .*0 to 1, got")


ALL = ("q", "k", "v", "index_q", "index_k")


@pytest.mark.parametrize("names", [ALL, ("q", "k", "v"), ("index_q", "index_k"), ("k", "v"), ("q",), ("index_q",)])
def test_tensors_of_another_layout(names):
    inputs = make_inputs(40, batch=2)._asdict()
    wrong = {name: x.transpose(1, 2) if name in names else x for name, x in inputs.items()}
    named = ", ".join(names)
    with pytest.raises(
        ValueError, match=rf"^{named}: expected \[B, H, S, D\].*looks like \[B, S, H, D\]; pass {names[0]}\.tr"
    ):
        flexmsa.attention(**wrong, block_size=8, topk=2)


def test_tensors_of_another_layout_in_the_single_steps():
    q, k, v, index_q, index_k = make_inputs(40)
    wanted = AuxRequest(lse=True, block_indices=True)
    _, aux = flexmsa.attention(q, k, v, index_q, index_k, block_size=8, topk=2, return_aux=wanted)
    turned = [x.transpose(1, 2) for x in (q, k, v, index_q, index_k)]
    message = r"looks like \[B, S, H, D\]"
    with pytest.raises(ValueError, match="^index_q, index_k.*" + message):
        flexmsa.select_blocks(*turned[3:], block_size=8, topk=2)
    with pytest.raises(ValueError, match="^q, k, v: .*" + message):
        flexmsa.block_sparse_attention(*turned[:3], aux.block_indices, block_size=8)
    with pytest.raises(ValueError, match="^q, k, index_q, index_k: .*" + message):
        flexmsa.index_loss(*turned[:2], *turned[3:], aux.block_indices, aux.lse, block_size=8)


@pytest.mark.parametrize("topk", [2, None])
def test_meta_tensors_give_meta_results(topk):
    inputs = [x.to("meta").requires_grad_() for x in make_inputs(40)]
    out, aux = flexmsa.attention(*inputs, block_size=8, topk=topk, return_aux=WITH_LOSS)
    (out.sum() + aux.index_loss).backward()
    assert out.shape == inputs[0].shape and out.is_meta and all(x.grad.shape == x.shape for x in inputs)
    with torch.device("meta"):
        layer, x = MSAttention(CONFIG), torch.randn(2, 20, 32)
    assert layer(x)[0].is_meta and not layer.state_dict()["_extra_state"].is_meta
    with torch.no_grad():
        assert layer(x, cache=layer.new_cache(2, 32))[0].is_meta


def test_e4m3_says_where_it_goes():
    inputs = [x.to(torch.float8_e4m3fn) for x in make_inputs(40)]
    with pytest.raises(TypeError, match=r"^q: .*float8_e4m3fn; cast it; select_blocks and the caches take e4m3"):
        flexmsa.attention(*inputs, block_size=8, topk=2)


def _loss(q, others, **settings):
    out, aux = flexmsa.attention(q, *others, block_size=8, topk=2, return_aux=WITH_LOSS, **settings)
    return out.square().sum() + aux.index_loss


def test_transforms_of_functions_say_what_to_do():
    q, *others = make_inputs(40)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms.*backend='reference'"):
        torch.func.grad(_loss)(q, others)
    found = torch.func.grad(lambda q: _loss(q, others, backend="reference"))(q)
    _loss(q.requires_grad_(), others).backward()
    assert_close("q.grad", found, q.grad, q.grad)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("name", ["q", "index_q"])
def test_second_derivatives_say_what_to_do(name, in_backward):
    inputs = make_inputs(40, requires_grad=True)
    value = torch.tensor(torch.nan) if in_backward else None
    loss = _loss(inputs.q, inputs[1:], index_loss_value=value)
    (grad,) = torch.autograd.grad(loss, getattr(inputs, name), create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives \(create_graph=True\).*backend='reference'"):
        grad.square().sum().backward()
    assert value is None or not value.requires_grad


@pytest.mark.parametrize(
    ("package", "extra", "hidden"),
    [("flexmsa.testing", "test", "hypothesis"), ("flexmsa.integrations.transformers", "transformers", "transformers")],
)
def test_a_missing_extra_says_what_to_install(package, extra, hidden):
    code = f"import sys; sys.modules[{hidden!r}] = None; import {package}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = f"{package} needs {hidden}, which is not installed: pip install flexmsa[{extra}]"
    assert found.returncode and found.stderr.strip().splitlines()[-1] == f"ModuleNotFoundError: {message}"
