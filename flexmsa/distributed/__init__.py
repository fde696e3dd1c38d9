"""flexmsa on several GPUs, by torch.distributed: see docs/distributed.md."""

from flexmsa.distributed.loss import global_index_loss, global_index_loss_count
from flexmsa.distributed.tensor_parallel import tensor_parallel_plan

__all__ = ["global_index_loss", "global_index_loss_count", "tensor_parallel_plan"]
