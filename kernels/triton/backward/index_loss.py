"""The index loss beside the main branch's backward, which leaves it the teacher: its calls, gradients and value."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import Problem
from ..common.launch import view
from ..common.passes import PassLaunch
from ..common.softmax import LOG2_E
from ..loss.config import LossConfig, LossConstants, loss_constants
from ..loss.launch import launches_of, loss_config, make_call, slot_bytes, with_teacher
from ..loss.loads import LossCall, Sizes
from ..loss.reduce import Scale, loss_scale
from ..schedule.inverse_index import InverseIndex
from ..schedule.work_items import WorkItems
from .reduce import LossSums
from .workspace import TileSizes, Workspace


class IndexBranch(NamedTuple):
    """index_q [B, Hkv, Sq, Di], index_k [B, 1, Sk, Di], the gradient of the loss, a scalar, and index_scale.

    divisor: a scalar by which the sum of the losses is divided; None is their number.
    """

    index_q: Tensor
    index_k: Tensor
    grad_loss: Tensor
    index_scale: float
    divisor: Tensor | None


class IndexLoss(NamedTuple):
    """The loss of one backward: its call and launches; index_k, whose dtype its gradient gets; mean."""

    call: LossCall
    launches: list[PassLaunch]
    index_k: Tensor
    mean: Scale

    def sums(self) -> LossSums:
        """What `reduce.finish` makes the gradient of index_k and the loss of, after the last pass."""
        gradients, losses, index_k = self.call.gradients, self.call.buffers.losses, self.index_k
        assert gradients is not None
        results = index_k.new_empty(index_k.shape), losses.new_empty(())
        width = index_k.shape[3]
        sizes = gradients.grad_k.shape[0], index_k.numel() // width, width
        numbers = *sizes, losses, losses.numel(), self.mean.number
        return LossSums(gradients.grad_k, results[0], *numbers, results[1])

    def grad_index_q(self) -> Tensor:
        """The gradient of index_q, after the last pass."""
        assert self.call.gradients is not None
        return self.call.gradients.grad_q


def constants_of(problem: Problem, sizes: TileSizes, device: torch.device) -> tuple[LossConfig, LossConstants]:
    """Configuration and constants of the loss's kernels, for a teacher in tiles of these sizes."""
    config = loss_config(problem, device)
    return config, loss_constants(config, problem, sizes.entries, sizes.teacher_rows)


def bytes_per_slot(branch: IndexBranch, constants: LossConstants, length: int) -> int:
    """Bytes that the loss keeps for each top-k slot of a token, for work items of `length` entries."""
    return slot_bytes(constants, length, branch.index_q.element_size())


def prepare(
    branch: IndexBranch,
    workspace: Workspace,
    index: InverseIndex,
    items: WorkItems,
    num_ranges: int,
    sequences: Tensor,
    problem: Problem,
    config: LossConfig,
    constants: LossConstants,
) -> IndexLoss:
    """The loss for passes of up to num_ranges token ranges of an index."""
    index_q, index_k, index_scale = branch.index_q, branch.index_k, branch.index_scale
    mean = loss_scale(sequences, branch.grad_loss, branch.divisor, problem.num_kv_heads, index_scale)
    # Groups share the index keys: each range of a pass has a sum of its own.
    key_gradients = index_k.new_zeros((num_ranges, *index_k.shape), dtype=torch.float32)
    outputs = mean.unit, index_q.new_empty(index_q.shape), key_gradients
    shape = index_q.shape[0], problem.num_kv_heads, problem.group_size, index_q.shape[2], index_k.shape[2]
    # The main branch's scale is in the teacher.
    sizes = Sizes(*shape, 1.0, index_scale * LOG2_E.value)
    views = None, None, view(index_q), view(index_k)
    call = make_call(
        views, workspace.partial.teacher, None, outputs, index, items, num_ranges, sizes, config, constants
    )
    return IndexLoss(call, launches_of(call, with_teacher(call, index_k, workspace.rows.limits)), index_k, mean)
