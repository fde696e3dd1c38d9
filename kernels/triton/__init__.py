"""The kernels in Triton, for CUDA and ROCm: selection in one pass over the index keys, training, and decoding."""

from flexmsa.kernels.triton.backward.launch import attention_and_index_loss_backward, block_sparse_attention_backward
from flexmsa.kernels.triton.common.launch import expected
from flexmsa.kernels.triton.forward.launch import block_sparse_attention_forward
from flexmsa.kernels.triton.loss.launch import index_loss
from flexmsa.kernels.triton.selection.launch import scored_blocks, select_blocks
from flexmsa.kernels.triton.serving.append import append
from flexmsa.kernels.triton.serving.launch import attend_blocks, select_and_attend
from flexmsa.kernels.triton.serving.write import write_pages
from flexmsa.kernels.triton.step import short_training_step

__all__ = [
    "append",
    "attend_blocks",
    "attention_and_index_loss_backward",
    "block_sparse_attention_backward",
    "block_sparse_attention_forward",
    "expected",
    "index_loss",
    "scored_blocks",
    "select_and_attend",
    "select_blocks",
    "short_training_step",
    "write_pages",
]
