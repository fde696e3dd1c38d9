"""Find the keys that each token sees, from the arguments of a transformers model: padding, positions, a cache.

The result is the table of sequences (see flexmsa.kernels). Padding on the right is a separate sequence without keys,
so it costs nothing and does not enter the index loss. Padding on the left is before the first key of its row, so it
sees no key either. Where padding is between tokens, the keys of a row are gathered in front; the table is of those.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from flexmsa import ops
from flexmsa.integrations.transformers.gathered import (
    GatheredRows,
    has_gaps,
    may_hold_documents,
    note_documents,
    token_bounds,
)

__all__ = ["document_table", "find_sequences", "gathered_rows", "row_table"]


def find_sequences(
    tokens: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
    layer_idx: int = 0,
) -> Tensor | GatheredRows | None:
    """Return `sequences`, or None if every row is one sequence, which ends with the last key.

    Args:
        tokens: [B, Sq] or [B, Sq, width], the new tokens; only its shape and device are read.
        mask: [B, keys] bool, False for padding. None: no padding.
        position_ids: [B or 1, Sq]; they show where documents start. None: one document per row.
        cu_seqlens: [documents + 1] int32, offsets of documents packed in one row; replaces mask and position_ids.
        cache: the earlier keys; its layer `layer_idx` does not have the new ones yet.

    Raises:
        ValueError: the mask or the offsets are not as described.
    """
    seqlen = tokens.shape[1]
    past: int | Tensor = 0
    ends_with_last_key = True
    if cache is not None:
        past = cache.get_seq_length(layer_idx)
        # A static cache returns its whole buffer, and its counter tensor as the length.
        ends_with_last_key = isinstance(past, int) and past + seqlen == cache.get_mask_sizes(seqlen, layer_idx)[0]
    if isinstance(past, Tensor):
        past = past.to(tokens.device)
    if cu_seqlens is not None:
        table = document_table(cu_seqlens, tokens, past)
        _note_documents(cache, table, tokens, None, past)
        return table
    if mask is None and position_ids is None and ends_with_last_key:
        return None
    bounds = None
    if mask is not None:
        filled = _filled(mask.to(tokens.device), seqlen, past)
        bounds = token_bounds(filled)
        if has_gaps(filled, *bounds, seqlen, past, cache):
            keys = seqlen if cache is None else cache.get_mask_sizes(seqlen, layer_idx)[0]
            filled = F.pad(filled, (0, keys - filled.shape[1]))
            rows = gathered_rows(filled, position_ids, tokens, past)
            if position_ids is not None:
                _note_documents(cache, rows.table, tokens, None, past)
            return rows
    table = row_table(bounds, position_ids, tokens, past)
    if position_ids is not None or (cache is not None and may_hold_documents(cache)):
        _note_documents(cache, table, tokens, None if bounds is None else bounds[0], past)
    is_whole = mask is None and ends_with_last_key and isinstance(past, int) and past == 0
    return None if is_whole and table.shape[0] == tokens.shape[0] else table


def document_table(cu_seqlens: Tensor, tokens: Tensor, past: int | Tensor) -> Tensor:
    """Return `sequences` for documents packed in one row.

    Args:
        cu_seqlens: [documents + 1] int32, their offsets.
        tokens: [1, Sq] or [1, Sq, width]; only its shape and device are read.
        past: the number of keys before the first token.
    """
    batch, seqlen = tokens.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q: expected one packed row, B = 1, got B={batch}; flatten the batch")
    sequences = ops.sequence_table(tokens[:, None], cu_seqlens, None, None, seqlen)
    return torch.cat([sequences[:, :3], sequences[:, 3:] + past], dim=1).to(torch.int32)


def _note_documents(
    cache: Cache | None, table: Tensor, tokens: Tensor, first_key: Tensor | None, past: int | Tensor
) -> None:
    batch, seqlen = tokens.shape[:2]
    # The host does not wait for a GPU to find that a single token begins a document.
    if cache is not None and seqlen > 1 and not torch.compiler.is_compiling() and not table.is_meta:
        note_documents(cache, table, batch, first_key, past)


def row_table(
    bounds: tuple[Tensor, Tensor] | None, position_ids: Tensor | None, tokens: Tensor, past: int | Tensor
) -> Tensor:
    """Return `sequences` for rows that may be padded, continue a cache, or hold several documents.

    A document starts wherever `position_ids` do not increase by one. The first document of a row may have started in
    the cache: its first position is the number of its earlier keys, except that padding is never among them.

    Args:
        bounds: start, end [B] int64: the keys start .. end-1 of each row are tokens, others padding. None: no padding.
        position_ids: [B or 1, Sq], or None: one document per row.
        tokens: [B, Sq] or [B, Sq, width], the new tokens; only its shape and device are read.
        past: int or one-element tensor, the number of keys before the new tokens.
    """
    batch, seqlen = tokens.shape[:2]
    first_key = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    past, num_tokens, is_start = past + first_key, None, None
    if bounds is not None:
        first_key, num_tokens = bounds[0], (bounds[1] - past).clamp(0, seqlen)
    depth = past
    if position_ids is not None:
        position_ids = position_ids.reshape(-1, seqlen).expand(batch, seqlen)
        depth = position_ids[:, 0]
        token = torch.arange(seqlen, device=tokens.device)
        is_start = (_steps(position_ids) != 1) & (token > (first_key - past)[:, None])
    return _table(tokens, past, depth, first_key, num_tokens, is_start)


def gathered_rows(filled: Tensor, position_ids: Tensor | None, tokens: Tensor, past: int | Tensor) -> GatheredRows:
    """Return the rows with their tokens in front, of rows with padding between tokens.

    Behind padding, `position_ids` tell of a document only where they are 0: those that `generate` makes may count the
    padding or not, and start anew behind padding on the right.

    Args:
        filled: [B, keys] bool, whether a key is a token.
        position_ids, tokens, past: as for `row_table`.
    """
    batch, seqlen = tokens.shape[:2]
    token = torch.arange(seqlen, device=tokens.device)
    is_token = filled[:, token + past]
    keys, queries = _tokens_first(filled), _tokens_first(is_token)
    num_tokens = is_token.sum(1)
    num_earlier = filled.sum(1) - num_tokens
    depth, is_start = num_earlier, None
    if position_ids is not None:
        position_ids = position_ids.reshape(-1, seqlen).expand(batch, seqlen).gather(1, queries)
        first = keys[:, 0]
        has_gap = num_earlier < past - first
        depth = torch.where(has_gap & (position_ids[:, 0] != 0), num_earlier, position_ids[:, 0])
        is_start = torch.where(_steps(queries) == 1, _steps(position_ids) != 1, position_ids == 0)
    table = _table(tokens, num_earlier, depth, torch.zeros_like(num_tokens), num_tokens, is_start)
    return GatheredRows(table, keys, queries, queries.argsort(dim=1))


def _tokens_first(filled: Tensor) -> Tensor:
    return (~filled).to(torch.uint8).argsort(dim=1, stable=True)


def _steps(x: Tensor) -> Tensor:
    """Return by how much each column of x [B, Sq] is more than the one before it; 1 for the first."""
    return F.pad(x.diff(dim=1), (1, 0), value=1)


def _table(
    tokens: Tensor, past: Tensor, depth: Tensor, first_key: Tensor, num_tokens: Tensor | None, is_start: Tensor | None
) -> Tensor:
    """Return `sequences`; past, depth, first_key, num_tokens [B]: those of each row. is_start [B, Sq]: of documents."""
    batch, seqlen = tokens.shape[:2]
    rows = torch.arange(batch, device=tokens.device)
    if seqlen == 1:
        begins = rows
    elif is_start is not None:
        begins = _document_starts(is_start, num_tokens)
    elif num_tokens is not None:
        begins = torch.stack([rows * seqlen, rows * seqlen + num_tokens], dim=1).flatten()
    else:
        begins = rows * seqlen
    num_tokens = torch.full_like(rows, seqlen) if num_tokens is None else num_tokens
    # Not of begins[1:], which in a traced graph would be of one row less than the batch.
    ends = torch.cat([begins, torch.full_like(begins[:1], batch * seqlen)])[1:]
    row = (begins // seqlen).clamp(max=batch - 1)
    q_start, q_end = begins - row * seqlen, ends - row * seqlen
    sees_keys = (q_start < num_tokens[row]) & (q_start < q_end)
    k_end = torch.where(sees_keys, q_end + past[row], 0)
    k_start = torch.where(q_start == 0, (past - depth)[row], q_start + past[row])
    k_start = torch.minimum(torch.maximum(k_start, first_key[row]), k_end)
    return torch.stack([row, q_start, q_end, k_start, k_end], dim=1).to(torch.int32)


def _filled(mask: Tensor, seqlen: int, past: int | Tensor) -> Tensor:
    """Return [B, keys] bool, whether a key so far is a token.

    Raises:
        ValueError: the mask has another shape.
    """
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask: expected [B, keys], True for tokens and False for padding, got {list(mask.shape)}; "
            'a mask for each query needs attn_implementation="eager"'
        )
    if isinstance(past, int) and mask.shape[1] < past + seqlen:
        raise ValueError(
            f"attention_mask: expected [B, {past + seqlen}], {past} keys in the cache and {seqlen} new ones, "
            f"got {list(mask.shape)}"
        )
    key = torch.arange(mask.shape[1], device=mask.device)
    return mask.bool() & (key < past + seqlen)


def _document_starts(is_start: Tensor, num_tokens: Tensor | None) -> Tensor:
    """Return the tokens, numbered 0 to B*Sq-1, that start a sequence: a row, a document or the padding on the right.

    Their number is unknown in a traced graph, which therefore returns B*Sq entries; unused entries are B*Sq.
    """
    batch, seqlen = is_start.shape
    token = torch.arange(seqlen, device=is_start.device)
    if num_tokens is not None:
        is_start = (is_start & (token < num_tokens[:, None])) | (token == num_tokens[:, None])
    is_start = (is_start | (token == 0)).flatten()
    if not torch.compiler.is_compiling():
        return is_start.nonzero().squeeze(1)
    flat = torch.arange(batch * seqlen, device=is_start.device)
    return torch.where(is_start, flat, batch * seqlen).sort().values
