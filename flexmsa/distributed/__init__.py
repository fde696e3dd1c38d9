"""flexmsa on several GPUs, by torch.distributed: see docs/distributed.md."""

from flexmsa.distributed.loss import global_index_loss, global_index_loss_count

__all__ = ["global_index_loss", "global_index_loss_count"]
