"""The index loss over several processes with unequal batches: a mean over all, in value and gradient."""

from itertools import product

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from flexmsa import AuxOutput, AuxRequest, MSAConfig, MSAttention, attention
from flexmsa.distributed import global_index_loss, global_index_loss_count

from .processes import device_type, run

CONFIG = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, block_size=4, topk=2)
LENGTHS = (5, 24)


def new_layer(topk, in_backward):
    torch.manual_seed(0)
    layer = MSAttention(CONFIG if not in_backward else MSAConfig(**{**vars(CONFIG), "loss_in_backward": True}))
    layer.topk = topk
    return layer.double()


def batch(number):
    torch.manual_seed(10 + number)
    return torch.randn(1, LENGTHS[number], CONFIG.hidden_size, dtype=torch.float64)


def expected(topk):
    """The loss and the gradients of one process, as means over the losses of both batches."""
    layer = new_layer(topk, False)
    losses = [layer(batch(number))[1] * LENGTHS[number] for number in range(2)]
    loss = sum(losses) / sum(LENGTHS)
    loss.backward()
    return loss.item(), index_gradients(layer)


def index_gradients(layer):
    return [p.grad.flatten().tolist() for name, p in layer.named_parameters() if "index" in name]


class LossOfSum(torch.nn.Module):
    """A layer whose loss is a mean over all processes."""

    def __init__(self, layer, mesh):
        super().__init__()
        self.layer, self.mesh = layer, mesh

    def forward(self, x):
        inputs = self.layer.project(x)
        request = AuxRequest(index_loss_sum=True)
        out, aux = attention(*inputs, block_size=4, topk=self.layer.topk, return_aux=request)
        return out, global_index_loss(aux, self.mesh)


def train(topk, how):
    mesh = init_device_mesh(device_type(), (2,))
    layer, x = new_layer(topk, how == "count, in the backward"), batch(mesh.get_rank())
    model = LossOfSum(layer, mesh) if how == "sum" else layer
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    if how == "sum":
        loss = wrapped(x)[1]
    else:
        count = global_index_loss_count(layer.index_loss_count(x), mesh)
        loss = wrapped(x, index_loss_count=count)[1]
    loss.backward()
    value = layer.index_loss_value if how == "count, in the backward" else loss
    return value.item(), index_gradients(layer)


CASES = list(product([2, None], ["sum", "count", "count, in the backward"]))


def train_all():
    return [(train(*case), expected(case[0])) for case in CASES]


@pytest.fixture(scope="module")
def trained():
    """By case, what each process found: all in one start of the processes, which takes longer than the cases."""
    return dict(zip(CASES, zip(*run(2, train_all), strict=True), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unequal_batches_under_ddp(case, trained):
    _, how = case
    loss = trained[case][0][1][0]
    for (_, found), (_, grads) in trained[case]:
        for grad, want in zip(found, grads, strict=True):
            assert grad == pytest.approx(want, rel=1e-12, abs=1e-14)
    values = [value for (value, _), _ in trained[case]]
    if how == "sum":
        assert values == pytest.approx([loss, loss], rel=1e-12)
    else:
        # Each process has its part, times the number of processes; in the backward it is kept in float32.
        assert sum(values) / 2 == pytest.approx(loss, rel=1e-6 if "backward" in how else 1e-12)


def test_a_sum_is_needed():
    with pytest.raises(ValueError, match="expected index_loss_sum, got None; request it"):
        global_index_loss(AuxOutput(), None)
