"""Every kernel in plain PyTorch, for any device: one batched matrix product per key/value block and its queries."""

from flexmsa.kernels.torch.append import append
from flexmsa.kernels.torch.attention import block_sparse_attention_backward
from flexmsa.kernels.torch.decode import attend_blocks, select_and_attend
from flexmsa.kernels.torch.deferred_loss import attention_and_index_loss_backward
from flexmsa.kernels.torch.index_loss import index_loss
from flexmsa.kernels.torch.selection import scored_blocks, select_blocks
from flexmsa.kernels.torch.write import write_pages

__all__ = [
    "append",
    "attend_blocks",
    "attention_and_index_loss_backward",
    "block_sparse_attention_backward",
    "index_loss",
    "scored_blocks",
    "select_and_attend",
    "select_blocks",
    "write_pages",
]
