"""Until the paged API is there."""

from dataclasses import dataclass

import torch

import flexmsa


@dataclass(frozen=True)
class PagePools:
    k: torch.Tensor
    v: torch.Tensor
    index_k: torch.Tensor


class PagedBatch:
    def __init__(self, page_table, kv_lens, cu_seqlens_q=None, *, num_tokens):
        self.page_table, self.kv_lens, self.num_tokens = page_table, kv_lens, num_tokens
        rows = len(kv_lens)
        self.starts = (
            [i * (num_tokens // rows) for i in range(rows + 1)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
        )


def write_pages(k, v, index_k, pools, slot_mapping):
    live = slot_mapping >= 0
    size = pools.k.shape[2]
    page, at = slot_mapping[live] // size, slot_mapping[live] % size
    pools.k[page, :, at] = k[live]
    pools.v[page, :, at] = v[live]
    pools.index_k[page, :, at] = index_k[live]


def attend_pages(q, index_q, pools, batch, *, topk, num_local_blocks, num_init_blocks, scale, out):
    starts = batch.starts
    r = 0
    out.zero_()
    while r < len(starts) - 1:
        stop = r + 1
        count = starts[r + 1] - starts[r]
        while count == 1 and stop < len(starts) - 1 and starts[stop + 1] - starts[stop] == 1:
            stop += 1
        t = slice(starts[r], starts[stop])
        if count:
            rows = lambda x: x[t].unflatten(0, (stop - r, count)).transpose(1, 2)
            cache = flexmsa.PagedMSACache.wrap(
                pools.k, pools.v, pools.index_k, batch.page_table[r:stop].contiguous(), batch.kv_lens[r:stop].contiguous()
            )
            out[t] = (
                flexmsa.decode(
                    rows(q), cache, rows(index_q), block_size=pools.k.shape[2], topk=topk, scale=scale,
                    num_local_blocks=num_local_blocks, num_init_blocks=num_init_blocks,
                ).transpose(1, 2).flatten(0, 1)
            )
        r = stop
    return out
