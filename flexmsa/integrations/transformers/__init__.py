"""flexmsa in Hugging Face transformers (`pip install flexmsa[transformers]`)."""

from flexmsa._extras import missing

try:
    from flexmsa.integrations.transformers.convert import convert, msa_config, set_warm_up
    from flexmsa.integrations.transformers.index_branch import INDEX_MODULES
    from flexmsa.integrations.transformers.loading import from_pretrained
    from flexmsa.integrations.transformers.losses import IndexLosses, index_loss_count
    from flexmsa.integrations.transformers.minimax_m3 import register
    from flexmsa.integrations.transformers.tensor_parallel import minimax_m3_tp_plan
    from flexmsa.integrations.transformers.trainer import IndexLossMixin
    from flexmsa.integrations.transformers.training import (
        ConversionCallback,
        begin_sparse,
        begin_warm_up,
        check_optimizer,
        clip_gradients,
        log_entries,
        parameter_groups,
    )
except ModuleNotFoundError as error:
    raise missing("flexmsa.integrations.transformers", "transformers", error) from error

__all__ = [
    "INDEX_MODULES",
    "ConversionCallback",
    "IndexLossMixin",
    "IndexLosses",
    "begin_sparse",
    "begin_warm_up",
    "check_optimizer",
    "clip_gradients",
    "convert",
    "from_pretrained",
    "index_loss_count",
    "log_entries",
    "minimax_m3_tp_plan",
    "msa_config",
    "parameter_groups",
    "register",
    "set_warm_up",
]
