"""The kernels in Triton, for CUDA and ROCm: selection in one pass over the index keys, training, and decoding."""

from flexmsa.kernels.triton.append import append
from flexmsa.kernels.triton.attention import block_sparse_attention_forward
from flexmsa.kernels.triton.attention_backward import block_sparse_attention_backward
from flexmsa.kernels.triton.decode import attend_blocks, select_and_attend
from flexmsa.kernels.triton.index_loss import index_loss
from flexmsa.kernels.triton.selection import select_blocks

__all__ = [
    "append",
    "attend_blocks",
    "block_sparse_attention_backward",
    "block_sparse_attention_forward",
    "index_loss",
    "select_and_attend",
    "select_blocks",
]
