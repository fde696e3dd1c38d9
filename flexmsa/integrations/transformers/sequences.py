"""Find the keys that each token sees, from the arguments of a transformers model: padding, positions, a cache.

The result is the table of sequences (see flexmsa.kernels). Padding on the right is a separate sequence without keys,
so it costs nothing and does not enter the index loss. Padding on the left is before the first key of its row, so it
sees no key either.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from flexmsa import ops

__all__ = ["document_table", "find_sequences", "row_table"]


def find_sequences(
    tokens: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None = None,
    cache: Cache | None = None,
    layer_idx: int = 0,
) -> Tensor | None:
    """Return `sequences`, or None if every row is one sequence, which ends with the last key.

    Args:
        tokens: [B, Sq] or [B, Sq, width], the new tokens; only its shape and device are read.
        mask: [B, keys] bool, False for padding. None: no padding.
        position_ids: [B or 1, Sq]; they show where documents start. None: one document per row.
        cu_seqlens: [documents + 1] int32, offsets of documents packed in one row; replaces mask and position_ids.
        cache: the earlier keys; its layer `layer_idx` does not have the new ones yet.

    Raises:
        ValueError: the mask or the offsets are not as described, or there is padding between tokens.
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
        return document_table(cu_seqlens, tokens, past)
    if mask is None and position_ids is None and ends_with_last_key:
        return None
    table = row_table(mask, position_ids, tokens, past)
    is_whole = mask is None and ends_with_last_key and isinstance(past, int) and past == 0
    return None if is_whole and len(table) == len(tokens) else table


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


def row_table(mask: Tensor | None, position_ids: Tensor | None, tokens: Tensor, past: int | Tensor) -> Tensor:
    """Return `sequences` for rows that may be padded, continue a cache, or hold several documents.

    A document starts wherever `position_ids` do not increase by one. The first document of a row may have started in
    the cache: its first position is the number of its earlier keys, except that padding is never among them.

    Args:
        mask: [B, at least the keys so far] bool, False for padding on either side. None: no padding.
        position_ids: [B or 1, Sq], or None: one document per row.
        tokens: [B, Sq] or [B, Sq, width], the new tokens; only its shape and device are read.
        past: int or one-element tensor, the number of keys before the new tokens.
    """
    batch, seqlen = tokens.shape[:2]
    rows = torch.arange(batch, device=tokens.device)
    first_key, num_tokens = torch.zeros_like(rows), torch.full_like(rows, seqlen)
    if mask is not None:
        first_key, num_tokens = _padding(mask.to(tokens.device), seqlen, past)
    depth = past + torch.zeros_like(rows)
    if position_ids is not None:
        position_ids = position_ids.reshape(-1, seqlen).expand(batch, seqlen)
        depth = position_ids[:, 0]
    if seqlen == 1:
        begins = rows
    elif position_ids is not None:
        begins = _document_starts(position_ids, first_key - past, num_tokens)
    elif mask is not None:
        begins = torch.stack([rows * seqlen, rows * seqlen + num_tokens], dim=1).flatten()
    else:
        begins = rows * seqlen
    ends = torch.cat([begins[1:], torch.full_like(begins[:1], batch * seqlen)])
    row = (begins // seqlen).clamp(max=batch - 1)
    q_start, q_end = begins - row * seqlen, ends - row * seqlen
    sees_keys = (q_start < num_tokens[row]) & (q_start < q_end)
    k_end = torch.where(sees_keys, q_end + past, 0)
    k_start = torch.where(q_start == 0, past - depth[row], q_start + past)
    k_start = torch.minimum(torch.maximum(k_start, first_key[row]), k_end)
    return torch.stack([row, q_start, q_end, k_start, k_end], dim=1).to(torch.int32)


def _padding(mask: Tensor, seqlen: int, past: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row its first key, and the number of its new tokens before the padding on the right."""
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
    filled = mask.bool() & (key < past + seqlen)
    end = torch.where(filled, key + 1, 0).amax(1)
    start = torch.minimum(torch.where(filled, key, len(key)).amin(1), end)
    _check_no_gap(filled.sum(1) == end - start, seqlen)
    return start, (end - past).clamp(0, seqlen)


def _check_no_gap(is_whole: Tensor, seqlen: int) -> None:
    """Raise if a row has padding between tokens.

    Where the host must not wait for a GPU, in a single token's step and in graphs, it is an assertion on the device.
    """
    message = (
        "attention_mask: expected padding on the left or the right of a row, got padding between tokens; "
        "pad prompts on the left to generate from them"
    )
    on_gpu = is_whole.is_cuda
    if torch.compiler.is_compiling() or (on_gpu and (seqlen == 1 or torch.cuda.is_current_stream_capturing())):
        torch._assert_async(is_whole.all(), message)
    elif not is_whole.is_meta and not is_whole.all():
        raise ValueError(message)


def _document_starts(position_ids: Tensor, first_token: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the tokens, numbered 0 to B*Sq-1, that start a sequence: a row, a document or the padding on the right.

    Their number is unknown in a traced graph, which therefore returns B*Sq entries; unused entries are B*Sq.
    """
    batch, seqlen = position_ids.shape
    token = torch.arange(seqlen, device=position_ids.device)
    jumps = torch.nn.functional.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    is_start = jumps & (token > first_token[:, None]) & (token < num_tokens[:, None])
    is_start = (is_start | (token == 0) | (token == num_tokens[:, None])).flatten()
    if not torch.compiler.is_compiling():
        return is_start.nonzero().squeeze(1)
    flat = torch.arange(batch * seqlen, device=position_ids.device)
    return torch.where(is_start, flat, batch * seqlen).sort().values
