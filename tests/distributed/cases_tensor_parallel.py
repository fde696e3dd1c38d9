"""MSAttention with its heads over several processes: everything equals one process's, in float64."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flexmsa import MSAConfig, MSAttention, save_selection_policy, select_blocks
from flexmsa.distributed import global_index_loss_count, tensor_parallel_plan

CONFIG = MSAConfig(32, num_heads=8, num_kv_heads=4, head_dim=8, index_head_dim=6, block_size=4, topk=2)
LENGTHS = {"plain": {}, "packed": {"cu_seqlens": [0, 5, 24]}, "padded": {"kv_starts": [0, 7]}}
SETTINGS = {"block_size": CONFIG.block_size, "topk": CONFIG.topk}


def new_layer(topk=2, in_backward=False, **changes):
    torch.manual_seed(0)
    layer = MSAttention(replace(CONFIG, loss_in_backward=in_backward, **changes)).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    layer.topk = topk
    # A float64 value shows more digits of the loss than the layer's own buffer, of float32.
    layer.index_loss_value = torch.full((), torch.nan, dtype=torch.float64)
    return layer


def inputs(lengths, rows=2, seed=1):
    torch.manual_seed(seed)
    lengths = {name: torch.tensor(values, dtype=torch.int32) for name, values in LENGTHS[lengths].items()}
    rows = 1 if "cu_seqlens" in lengths else rows
    x, weight = torch.randn(2, rows, 24, CONFIG.hidden_size, dtype=torch.float64)
    return x.requires_grad_(), weight, lengths


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(layer):
    """Those of all parameters, none of which is left as partial sums, that a user's optimizer may not expect."""
    for parameter in layer.parameters():
        if isinstance(parameter, DTensor):
            assert parameter.grad.placements == parameter.placements
    return {name: full(parameter.grad) for name, parameter in layer.named_parameters()}


def step(layer, x, weight, lengths, run_layer=None):
    """out, the loss's value, and the gradients of x and of all parameters, for out's gradient `weight`."""
    out, loss = (layer if run_layer is None else run_layer)(x, **lengths)
    (out * weight).sum().add(loss * 0.7).backward()
    value = layer.index_loss_value if layer.config.loss_in_backward else loss
    return {"out": out.detach(), "loss": value.detach().clone(), "x": x.grad, **gradients(layer)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


def check_step(mesh, topk, in_backward, lengths, **more):
    layer = new_layer(topk, in_backward, **more)
    expected = step(layer, *inputs(lengths))
    layer = parallelize_module(new_layer(topk, in_backward, **more), mesh, tensor_parallel_plan(layer))
    assert_same(step(layer, *inputs(lengths)), expected)
    x, _, given = inputs(lengths)
    assert layer.index_loss_count(x, **given).item() == new_layer(**more).index_loss_count(x, **given).item()


def check_ids(mesh, groups=CONFIG.num_kv_heads):
    layer, (x, _, _) = new_layer(num_kv_heads=groups), inputs("plain")
    with torch.no_grad():
        ids = select_blocks(*layer.project(x)[3:], **SETTINGS)
        parallelize_module(layer, mesh, tensor_parallel_plan(layer))
        own = select_blocks(*layer.project(x)[3:], **SETTINGS)
    first, number = mesh.get_local_rank() * groups // mesh.size(), max(1, groups // mesh.size())
    assert torch.equal(own, ids[:, first : first + number])


def check_cache(mesh, groups=CONFIG.num_kv_heads):
    layer, (x, _, _) = new_layer(num_kv_heads=groups).eval(), inputs("plain")
    parts = x.detach()[:, :20], x.detach()[:, 20:21]
    found = []
    for parallel in (False, True):
        if parallel:
            parallelize_module(layer, mesh, tensor_parallel_plan(layer))
        cache = layer.new_cache(2, 24)
        assert cache.k.shape[1] == (max(1, groups // mesh.size()) if parallel else groups)
        with torch.no_grad():
            found.append(torch.cat([layer(part, cache=cache)[0] for part in parts], dim=1))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def check_sequence_parallel(mesh, in_backward, lengths, **more):
    expected = step(new_layer(in_backward=in_backward, **more), *inputs(lengths))
    layer = new_layer(in_backward=in_backward, **more)
    parallelize_module(layer, mesh, tensor_parallel_plan(layer, sequence_parallel=True))
    x, weight, given = inputs(lengths)
    here = mesh.get_local_rank()
    own = x.detach().chunk(mesh.size(), dim=1)[here].clone().requires_grad_()
    assert layer.index_loss_count(own, **given).item() == new_layer(**more).index_loss_count(x, **given).item()
    found = step(layer, own, weight.chunk(mesh.size(), dim=1)[here], given)
    for name in ("x", "out"):
        found[name] = DTensor.from_local(found[name], mesh, [Shard(1)]).full_tensor()
    assert_same(found, expected)
    with pytest.raises(ValueError, match="expected None with sequence_parallel"):
        layer(own, cache=layer.new_cache(2, 24))


def check_dtensor_input(mesh):
    expected = step(new_layer(), *inputs("plain"))
    layer = parallelize_module(new_layer(), mesh, tensor_parallel_plan(new_layer()))
    x, weight, _ = inputs("plain")
    x = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
    found = step(layer, x, weight, {})
    assert_same({**found, "x": found["x"].full_tensor()}, expected)


def check_collectives(mesh, sequence_parallel, in_backward):
    """Those that docs/distributed.md lists."""
    layer = new_layer(in_backward=in_backward)
    parallelize_module(layer, mesh, tensor_parallel_plan(layer, sequence_parallel=sequence_parallel))
    x = inputs("plain")[0]
    found = []
    with CommDebugMode() as forward:
        out, loss = layer(x)
    with CommDebugMode() as backward:
        (out.sum() + loss).backward()
    for mode in (forward, backward):
        counts = {str(name).split(".")[-1]: count for name, count in mode.get_comm_counts().items()}
        found.append(
            [counts.get(name, 0) for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")]
        )
    # One all-reduce for each norm and for the projection of index_k.
    replicated = 5
    around = [[1, 1, 0], [1, 1, 0]] if sequence_parallel else [[0, 0, 1], [0, 0, 1]]
    around[in_backward][2] += 1
    around[1][2] += replicated
    assert found == around, (found, around)


def check_optimizer(mesh):
    """Two steps with clipped gradients: the norm, and the parameters."""
    found = []
    for layer in (new_layer(), parallelize_module(new_layer(), mesh, tensor_parallel_plan(new_layer()))):
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, eps=1.0, foreach=True)
        for seed in range(2):
            step(layer, *inputs("plain", seed=seed))
            norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        parameters = {name: full(parameter.detach()) for name, parameter in layer.named_parameters()}
        found.append({"norm": full(norm), **parameters})
    assert_same(found[1], found[0])


def check_checkpoint(mesh, in_backward):
    expected = step(new_layer(in_backward=in_backward), *inputs("plain"))
    layer = parallelize_module(new_layer(in_backward=in_backward), mesh, tensor_parallel_plan(new_layer()))
    contexts = partial(create_selective_checkpoint_contexts, save_selection_policy)
    saving = partial(checkpoint, layer, use_reentrant=False, context_fn=contexts)
    assert_same(step(layer, *inputs("plain"), run_layer=saving), expected)


def check_index_branch_alone(mesh):
    """A frozen base, as in the first phase."""
    found = []
    for layer in (new_layer(in_backward=True), new_layer(in_backward=True)):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name.startswith("index_"))
        if found:
            parallelize_module(layer, mesh, tensor_parallel_plan(layer))
        layer(inputs("plain")[0].detach())[1].backward()
        grads = {name: full(p.grad) for name, p in layer.named_parameters() if p.requires_grad}
        found.append({"loss": layer.index_loss_value, **grads})
    assert_same(found[1], found[0])


def check_two_backwards(mesh):
    """A backward of the output alone leaves the loss's value as it was."""
    layer = new_layer(in_backward=True)
    expected = step(layer, *inputs("plain"))["loss"]
    layer = parallelize_module(new_layer(in_backward=True), mesh, tensor_parallel_plan(layer))
    out, loss = layer(inputs("plain")[0])
    loss.backward(retain_graph=True)
    out.sum().backward()
    torch.testing.assert_close(layer.index_loss_value, expected, rtol=1e-12, atol=0)


def check_compiled(mesh, in_backward, **more):
    torch._dynamo.reset()
    layer = new_layer(in_backward=in_backward, **more)
    expected = step(layer, *inputs("plain"))
    layer = parallelize_module(new_layer(in_backward=in_backward, **more), mesh, tensor_parallel_plan(layer))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(step(layer, *inputs("plain"), run_layer=compiled), expected)


def check_plain_styles(mesh, names):
    layer = new_layer()
    styles = {name: RowwiseParallel() if name == "o_proj" else ColwiseParallel() for name in names}
    parallelize_module(layer, mesh, styles)
    with pytest.raises(ValueError, match="shard the heads by flexmsa"):
        layer(inputs("plain")[0])


def check_refusals(mesh):
    layer = MSAttention(replace(CONFIG, num_kv_heads=3, num_heads=6))
    with pytest.raises(ValueError, match=r"expected a multiple or a divisor of the 2 processes .*, got 3 and 6"):
        parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    with pytest.raises(TypeError, match="expected an MSAttention, got Linear"):
        parallelize_module(layer, mesh, {"q_proj": tensor_parallel_plan(layer)})
    layer = parallelize_module(new_layer(), mesh, tensor_parallel_plan(new_layer()))
    with pytest.raises(ValueError, match="got a layer that has one"):
        parallelize_module(layer, mesh, tensor_parallel_plan(layer))


def check_fsdp(mesh, in_backward):
    """FSDP2 over "dp", the heads over "tp", unequal numbers of visible queries: the mean over both."""
    batches = [inputs("plain", seed=1), inputs("padded", seed=2)]
    layer = new_layer(in_backward=in_backward)
    counts = [layer.index_loss_count(x, **given) for x, _, given in batches]
    values = []
    for x, weight, given in batches:
        out, loss = layer(x, **given, index_loss_count=sum(counts))
        ((out * weight).sum() / 2 + loss).backward()
        values.append(layer.index_loss_value.clone() if in_backward else loss.detach())
    expected = gradients(layer)

    layer = new_layer(in_backward=in_backward)
    parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer))
    fully_shard(layer, mesh=mesh["dp"])
    x, weight, given = batches[mesh.get_local_rank("dp")]
    count = global_index_loss_count(layer.index_loss_count(x, **given), mesh["dp"])
    out, loss = layer(x, **given, index_loss_count=count)
    ((out * weight).sum() + loss).backward()
    assert_same(gradients(layer), expected)
    value = (layer.index_loss_value if in_backward else loss).detach() / 2
    torch.testing.assert_close(value, values[mesh.get_local_rank("dp")], rtol=1e-12, atol=0)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    **{f"step {case}": (check_step, *case) for case in product([2, None], [False, True], LENGTHS)},
    "step with bias, without norms": (lambda mesh: check_step(mesh, 2, False, "plain", bias=True, qk_norm=False),),
    "ids": (check_ids,),
    "cache": (check_cache,),
    **{f"sequence {case}": (check_sequence_parallel, *case) for case in product([False, True], LENGTHS)},
    "DTensor input": (check_dtensor_input,),
    **{f"collectives {case}": (check_collectives, *case) for case in product([False, True], [False, True])},
    "optimizer": (check_optimizer,),
    **{f"checkpoint {case}": (check_checkpoint, case) for case in (False, True)},
    "index branch alone": (check_index_branch_alone,),
    "two backwards": (check_two_backwards,),
    "one group": (lambda mesh: check_step(mesh, 2, False, "padded", num_kv_heads=1, bias=True),),
    "one group, compiled": (lambda mesh: check_compiled(mesh, True, num_kv_heads=1),),
    "compiled": (check_compiled, True),
    "plain styles": (check_plain_styles, [*PROJECTIONS, "index_q_proj"]),
    "plain styles, main branch": (check_plain_styles, PROJECTIONS),
    "plain styles, index branch": (check_plain_styles, ["index_q_proj"]),
    "refusals": (check_refusals,),
}
CASES_OF_FOUR = {
    **{f"FSDP2 {case}": (check_fsdp, case) for case in (False, True)},
    "four processes": (lambda mesh: check_step(mesh._flatten(), 2, True, "plain"),),
    **{
        f"two groups {case}": (lambda mesh, *case: check_step(mesh._flatten(), *case, num_kv_heads=2), *case)
        for case in product([2, None], [False, True], LENGTHS)
    },
    "two groups, tokens": (lambda mesh: check_sequence_parallel(mesh._flatten(), False, "packed", num_kv_heads=2),),
    "two groups, ids": (lambda mesh: check_ids(mesh._flatten(), 2),),
    "two groups, cache": (lambda mesh: check_cache(mesh._flatten(), 2),),
}
