"""MiniMax Sparse Attention for PyTorch: a light index branch selects blocks of keys; attention to them is exact."""

from flexmsa import metrics
from flexmsa.cache import MSACache
from flexmsa.checkpoint import save_attention_policy, save_selection_policy
from flexmsa.compiling import warm_up
from flexmsa.config import MSAConfig
from flexmsa.decoding import decode
from flexmsa.flex import create_block_mask, pack_gqa, packed_flex_attention, unpack_gqa
from flexmsa.functional import attention, block_sparse_attention, index_loss, select_blocks
from flexmsa.kernels.workspace import set_workspace_limit
from flexmsa.modules import MSAttention
from flexmsa.paged import PagedBatch, PagePools, attend_pages, select_pages, write_pages
from flexmsa.paged_cache import PagedMSACache
from flexmsa.tuning import autotune, clear_tuning, load_tuning, set_certified_selection
from flexmsa.types import AuxOutput, AuxRequest

__version__ = "0.1.0"

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "MSACache",
    "MSAConfig",
    "MSAttention",
    "PagePools",
    "PagedBatch",
    "PagedMSACache",
    "attend_pages",
    "attention",
    "autotune",
    "block_sparse_attention",
    "clear_tuning",
    "create_block_mask",
    "decode",
    "index_loss",
    "load_tuning",
    "metrics",
    "pack_gqa",
    "packed_flex_attention",
    "save_attention_policy",
    "save_selection_policy",
    "select_blocks",
    "select_pages",
    "set_certified_selection",
    "set_workspace_limit",
    "unpack_gqa",
    "warm_up",
    "write_pages",
]
