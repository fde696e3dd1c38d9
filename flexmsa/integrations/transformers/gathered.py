"""Rows with padding between tokens: their tokens are gathered in front, so that each row is one sequence again."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from flexmsa._buffers import is_recorded

__all__ = ["GatheredRows", "has_gaps", "may_hold_documents", "note_documents", "token_bounds"]

# What a cache is known to hold, as attributes of it: so a copy of the cache knows too, and no step reads a GPU.
_GAPS, _DOCUMENTS = "flexmsa_has_gaps", "flexmsa_has_documents"


class GatheredRows(NamedTuple):
    """The table of sequences of rows whose tokens come first, and how to gather them.

    Attributes:
        table: the table of sequences (see flexmsa.kernels) of the gathered tokens.
        keys: [B, keys] int64, the keys of each row, tokens first, both in their order.
        queries: [B, Sq] int64, likewise.
        places: [B, Sq] int64, where each query is among the gathered ones.
    """

    table: Tensor
    keys: Tensor
    queries: Tensor
    places: Tensor

    def gather_keys(self, x: Tensor) -> Tensor:
        """x [B, H, at least the keys, D] to [B, H, keys, D]."""
        return _gather(x, self.keys)

    def gather_queries(self, x: Tensor) -> Tensor:
        """x [B, H, Sq, D] to the same shape."""
        return _gather(x, self.queries)

    def restore(self, out: Tensor) -> Tensor:
        """Undo `gather_queries`."""
        return _gather(out, self.places)

    def to(self, device: torch.device) -> "GatheredRows":
        """Return the rows on `device`."""
        return GatheredRows(*(x.to(device) for x in self))


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def token_bounds(filled: Tensor) -> tuple[Tensor, Tensor]:
    """Return start, end [B] of rows `filled` [B, keys] bool: the first token and the one after the last; 0 without any.

    >>> token_bounds(torch.tensor([[False, True, True, False], [False, False, False, False]]))
    (tensor([1, 0]), tensor([3, 0]))
    """
    key = torch.arange(filled.shape[1], device=filled.device)
    end = torch.where(filled, key + 1, 0).amax(1)
    return torch.minimum(torch.where(filled, key, filled.shape[1]).amin(1), end), end


def has_gaps(filled: Tensor, start: Tensor, end: Tensor, seqlen: int, past: int | Tensor, cache: Cache | None) -> bool:
    """Return whether a row has padding between tokens.

    In a single token's step on a GPU, and in graphs, the host must not wait to read the mask. What the earlier forward
    passes found decides there, and if the mask has gaps that they did not find, an assertion fails on the device.

    Args:
        filled: [B, keys] bool, whether a key is a token.
        start, end: its `token_bounds`.
        seqlen: the number of new tokens.
        past: int or one-element tensor, the number of keys before them.
        cache: the earlier keys; it remembers the answer for the steps that follow.

    Raises:
        ValueError: a row has several documents in the cache, whose first tokens could not be found.
    """
    has_gap = filled.sum(1) < end - start
    if is_recorded(filled) or (filled.is_cuda and seqlen == 1):
        found = getattr(cache, _GAPS, False)
        if not found:
            message = (
                "attention_mask: expected padding on the left of a row, got padding between tokens, which no eager "
                "forward of several tokens has found in this cache; pad prompts on the left to generate from them"
            )
            torch._assert_async(~has_gap.any(), message)
    elif filled.is_meta:
        return False
    else:
        # Padding on the right will be between tokens once the next one is there.
        will_be = (end > start) & (end < past + seqlen)
        found, later, is_new = torch.stack([has_gap.any(), will_be.any(), end.new_zeros(()) + past == 0]).tolist()
        if cache is not None:
            _remember(cache, _GAPS, found or later)
            _remember(cache, _DOCUMENTS, not is_new and may_hold_documents(cache))
    if found and cache is not None and may_hold_documents(cache):
        raise ValueError(
            "attention_mask: expected no padding between tokens after several documents of a row in the cache, got "
            "some; begin with an empty cache, or without padding"
        )
    return found


def note_documents(cache: Cache, table: Tensor, batch: int, first_key: Tensor | None, past: int | Tensor) -> None:
    """Let `cache` remember if a row will hold several documents.

    Args:
        table: that of the new tokens. Padding on the right, also where there is none, has rows of it too.
        first_key: [B], the first token of each row; None: 0.
        past: int or one-element tensor, the number of keys before the new tokens.
    """
    row, _, _, k_start, k_end = table.long().unbind(1)
    sees_keys = k_end > k_start
    starts = sees_keys & (k_start > (0 if first_key is None else first_key[row]))
    several = (sees_keys.sum() > batch) | starts.any()
    found, is_new = torch.stack([several, several.new_zeros(()) + past == 0]).tolist()
    _remember(cache, _DOCUMENTS, found or (not is_new and may_hold_documents(cache)))


def may_hold_documents(cache: Cache) -> bool:
    """Return whether a row of the `cache` held several documents, if it was not emptied since."""
    return getattr(cache, _DOCUMENTS, False)


def _remember(cache: Cache, name: str, value: bool) -> None:
    """Set an attribute that is there only if it is True: an exported graph wants caches with the same attributes."""
    if value:
        setattr(cache, name, True)
    elif hasattr(cache, name):
        delattr(cache, name)
