"""Small types of the public API."""

from typing import NamedTuple

from torch import Tensor


class AuxRequest(NamedTuple):
    """The additional results to return: pass as `return_aux`, as with `flex_attention`.

    >>> AuxRequest(lse=True)
    AuxRequest(lse=True, block_indices=False, index_loss=False, index_loss_sum=False)
    """

    lse: bool = False
    block_indices: bool = False
    index_loss: bool = False
    index_loss_sum: bool = False

    @property
    def any_loss(self) -> bool:
        """Whether the index loss is to be computed."""
        return self.index_loss or self.index_loss_sum


class AuxOutput(NamedTuple):
    """The results that an `AuxRequest` requested; the others are None.

    Attributes:
        lse: [B, Hq, Sq] float32, natural logarithm of the sum of exponentials of the scaled main scores over the
            visible keys of the selected blocks; -inf where a query sees no key.
        block_indices: [B, Hkv, Sq, topk] int32, ascending, padded on the right with -1; None in the warm-up.
        index_loss: scalar float32, the KL loss of the index branch.
        index_loss_sum: scalar float32, the same loss before it is divided by the count.
        index_loss_count: scalar, with index_loss_sum: by default int64, the number of groups and queries that see a
            key; or the count that was given.
    """

    lse: Tensor | None = None
    block_indices: Tensor | None = None
    index_loss: Tensor | None = None
    index_loss_sum: Tensor | None = None
    index_loss_count: Tensor | None = None
