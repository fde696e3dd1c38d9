"""What an MSA layer is apart from its computation: the phase of training as part of its state, and a typed call."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexmsa import validation
from flexmsa.config import MSAConfig
from flexmsa.types import Requested

if TYPE_CHECKING:
    from flexmsa.cache import Cache
    from flexmsa.distributed import SequenceShards

__all__ = ["Layer"]


class Layer(nn.Module):
    """A layer with `config` and `topk`, whose state_dict and repr have the phase."""

    def __init__(self, config: MSAConfig) -> None:
        super().__init__()
        self.config = config
        self.topk = config.topk

    @property
    def topk(self) -> int | None:
        """The number of blocks that a query selects in each group; None in the dense warm-up."""
        return self._topk

    @topk.setter
    def topk(self, topk: int | None) -> None:
        config = self.config
        validation.check_settings(config.block_size, topk, config.num_local_blocks, config.num_init_blocks)
        self._topk = topk

    def extra_repr(self) -> str:
        """The phase, which a layer's weights do not show."""
        phase = "dense warm-up" if self.topk is None else "sparse"
        return f"topk={self.topk}, block_size={self.config.block_size}, phase={phase!r}"

    def get_extra_state(self) -> Tensor:
        """topk, 0 in the warm-up: a tensor, since not every format of checkpoints takes other objects."""
        return torch.tensor(self.topk or 0, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the phase; the number of blocks remains the layer's own where it has one."""
        saved = int(state)
        self.topk = (self.topk or self.config.topk or saved) if saved else None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing = args[2]
        if prefix + "_extra_state" in missing:
            missing.remove(prefix + "_extra_state")

    if TYPE_CHECKING:
        # The arguments of `MSAttention.forward`; `nn.Module.__call__` takes and returns anything.
        def __call__(
            self,
            x: Tensor,
            *,
            cache: Cache | None = None,
            lens: Tensor | None = None,
            block_indices: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
            kv_starts: Tensor | None = None,
            with_index_loss: bool | None = None,
            index_loss_count: Tensor | float | None = None,
            shards: SequenceShards | None = None,
            backend: str | None = None,
        ) -> tuple[Tensor, Requested]: ...
