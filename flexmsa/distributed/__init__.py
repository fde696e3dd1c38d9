"""flexmsa on several GPUs, by torch.distributed: see docs/distributed.md."""

from flexmsa.distributed.context_parallel import ContextParallel, context_parallel_attention
from flexmsa.distributed.fsdp import register_fsdp_methods
from flexmsa.distributed.loss import global_index_loss, global_index_loss_count
from flexmsa.distributed.sharded_cache import ShardedCache
from flexmsa.distributed.shards import SequenceShards
from flexmsa.distributed.tensor_parallel import tensor_parallel_plan

__all__ = [
    "ContextParallel",
    "SequenceShards",
    "ShardedCache",
    "context_parallel_attention",
    "global_index_loss",
    "global_index_loss_count",
    "register_fsdp_methods",
    "tensor_parallel_plan",
]
