"""torch.library operators of flexmsa: schemas, fake (shape) functions, choice of kernels, autograd and autocast."""

from .attention import block_sparse_attention, block_sparse_attention_backward
from .autocast import cast_to_autocast
from .cache import append, attend_blocks, select_and_attend
from .deferred_loss import attention_and_index_loss, attention_and_index_loss_backward, deferred_index_loss
from .dispatch import expected_training_step
from .flex import block_mask_lists, dense_mask_lists, pack_gqa, unpack_gqa
from .flops import register_formulas
from .index_loss import index_loss, index_loss_backward
from .pages import paged_table, second_part, select_pages, write_pages
from .selection import scored_blocks, select_blocks
from .sequences import fragment_table, next_positions, sequence_table

__all__ = [
    "append",
    "attend_blocks",
    "attention_and_index_loss",
    "attention_and_index_loss_backward",
    "block_mask_lists",
    "block_sparse_attention",
    "block_sparse_attention_backward",
    "cast_to_autocast",
    "deferred_index_loss",
    "dense_mask_lists",
    "expected_training_step",
    "fragment_table",
    "index_loss",
    "index_loss_backward",
    "next_positions",
    "pack_gqa",
    "paged_table",
    "scored_blocks",
    "second_part",
    "select_and_attend",
    "select_blocks",
    "select_pages",
    "sequence_table",
    "unpack_gqa",
    "write_pages",
]

register_formulas()
