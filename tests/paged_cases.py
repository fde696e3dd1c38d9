"""Steps of an engine over pages, and what each sequence gets on its own from the definition."""

from dataclasses import dataclass

import torch

import flexmsa
from flexmsa import AuxRequest
from flexmsa.testing import assert_close
from flexmsa.testing.assertions import product_size

FP8, FP64 = torch.float8_e4m3fn, torch.float64


@dataclass(frozen=True)
class Step:
    """queries, kv_lens: of each sequence; padding: tokens past the last sequence; uniform: without offsets.

    num_decodes: of the first sequences.

    scales: of e4m3 pages: "token", "tensor" or "none"; None for pages in the dtype of the queries.
    """

    queries: tuple[int, ...]
    kv_lens: tuple[int, ...]
    padding: int = 0
    uniform: bool = False
    num_decodes: int = 0
    scales: str | None = None
    dtype: torch.dtype = torch.float32
    page_size: int = 16
    topk: int | None = 3
    num_kv_heads: int = 2
    group_size: int = 3
    head_dim: int = 16
    index_head_dim: int = 16

    @property
    def num_tokens(self):
        return sum(self.queries) + self.padding

    @property
    def rule(self):
        return {"topk": self.topk, "num_init_blocks": 1}


CASES = {
    "decode": Step((1, 1, 1), (20, 77, 0), uniform=True),
    "drafts": Step((3, 3), (50, 9), uniform=True),
    "drafts of several lengths": Step((2, 1, 4), (50, 9, 33), padding=3),
    "chunks and decodes": Step((1, 21, 1, 0, 17), (90, 100, 3, 0, 17), padding=2),
    "decodes first": Step((1, 1, 21, 5), (90, 100, 30, 77), padding=3, num_decodes=2),
    "five decodes first": Step((1, 1, 1, 1, 1, 19), (90, 100, 3, 17, 48, 60), num_decodes=5),
    "decodes and padding": Step((1, 1), (90, 100), padding=3, num_decodes=2),
    "one chunk": Step((40,), (95,)),
    "fewer keys than queries": Step((5, 20), (3, 90)),
    "odd pages": Step((1, 18), (40, 50), page_size=12),
    "16 bits": Step((1, 19, 1), (70, 60, 33), dtype=torch.float16),
    "every block": Step((1, 18, 1), (70, 60, 33), topk=None),
    "scale per token": Step((1, 19, 1), (70, 60, 33), scales="token"),
    "scale per tensor": Step((1, 19, 1), (70, 60, 33), scales="tensor"),
    "no scale": Step((1, 1), (70, 60), scales="none", uniform=True),
}


def make_pools(step, num_pages):
    """Pages of garbage: keys and values side by side, as engines have them, and index keys beside a hole."""
    stored = FP8 if step.scales else step.dtype
    shape = num_pages, step.num_kv_heads, step.page_size
    both = torch.full((*shape, 2 * step.head_dim), float("nan")).to(stored)
    k, v = both.split(step.head_dim, dim=3)
    index_k = torch.full((num_pages, 1, step.page_size, step.index_head_dim + 8), float("nan")).to(stored)
    index_k = index_k[..., : step.index_head_dim]
    scales = {
        "token": [x.new_zeros(x.shape[:3], dtype=torch.uint8) for x in (k, v, index_k)],
        "tensor": [0.5, 2.0, 0.25],
    }
    return flexmsa.PagePools(k, v, index_k, *scales.get(step.scales, ()))


def stored_values(x, pool, scale):
    """What is read back of new tokens x."""
    if pool.dtype != FP8:
        return x
    if isinstance(scale, torch.Tensor):
        largest = x.float().abs().amax(-1, keepdim=True)
        scale = torch.exp2(torch.ceil(torch.log2(largest / 448)))
    factor = 1.0 if scale is None else scale
    return ((x.float() / factor).clamp(-448, 448).to(FP8).float() * factor).to(x.dtype)


def run(step, backend, seed=0):
    """Run a step through pages, compare with each sequence on its own, and return what it gave."""
    torch.manual_seed(seed)
    count, blocks = len(step.kv_lens), -(-max(step.kv_lens) // step.page_size) + 1
    pools = make_pools(step, count * blocks + 2)
    page_table = torch.full((count, 2 * blocks + 1), 2**31 - 1, dtype=torch.int32)[:, : blocks + 1]
    free = iter(torch.randperm(count * blocks + 2).tolist())
    kept = []
    for row, length in enumerate(step.kv_lens):
        used = [next(free) for _ in range(-(-length // step.page_size))]
        page_table[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
        position = torch.arange(length)
        slots = page_table[row, position // step.page_size].long() * step.page_size + position % step.page_size
        sizes = (step.num_kv_heads, step.head_dim), (step.num_kv_heads, step.head_dim), (1, step.index_head_dim)
        new = [torch.randn(length, heads, depth).to(step.dtype) for heads, depth in sizes]
        # Some tokens of a write belong to no sequence.
        more = [torch.cat([x, x[:1]]) if length else x for x in new]
        slots = torch.cat([slots, torch.tensor([-1])]) if length else slots
        if length:
            flexmsa.write_pages(*more, pools, slots, backend=backend)
        named = (pools.k, pools.k_scale), (pools.v, pools.v_scale), (pools.index_k, pools.index_k_scale)
        kept.append([stored_values(x, *pool) for x, pool in zip(new, named, strict=True)])
    num_heads = step.num_kv_heads * step.group_size
    q = torch.randn(step.num_tokens, num_heads, step.head_dim).to(step.dtype)
    index_q = torch.randn(step.num_tokens, step.num_kv_heads, step.index_head_dim).to(step.dtype)
    lens = torch.tensor(step.kv_lens, dtype=torch.int32)
    offsets = torch.tensor([0, *step.queries], dtype=torch.int32).cumsum(0).int()
    sizes = {"num_tokens": step.num_tokens, "num_decodes": step.num_decodes, "page_size": step.page_size}
    batch = flexmsa.PagedBatch(page_table, lens, None if step.uniform else offsets, **sizes)
    out = torch.full((step.num_tokens, 2 * num_heads, step.head_dim), float("nan")).to(step.dtype)[:, ::2]
    aux = AuxRequest(lse=True, block_indices=step.topk is not None)
    buffers = {"out": out}
    if step.topk is not None:
        buffers["block_indices_out"] = q.new_full((step.num_tokens, 2 * step.num_kv_heads, step.topk), 7).int()[:, ::2]
    found, more = flexmsa.attend_pages(
        q, index_q, pools, batch, **buffers, **step.rule, backend=backend, return_aux=aux
    )
    assert found is out and more.block_indices is buffers.get("block_indices_out")
    check(step, (q, index_q), kept, (out, more.lse, more.block_indices))
    if step.topk is not None:
        check_alone(step, (q, index_q), pools, batch, (out, more.block_indices), backend)
    return out


def check(step, queries, kept, found):
    """Compare with the reference, sequence by sequence; tokens past them see nothing."""
    first = 0
    for count, length, keys in zip(step.queries, step.kv_lens, kept, strict=True):
        part = slice(first, first + count)
        first += count
        out, lse, ids = (None if x is None else x[part] for x in found)
        seen = min(count, length)
        if count > seen:
            assert (out[: count - seen] == 0).all() and (lse[: count - seen] == -torch.inf).all()
        if seen == 0:
            continue
        q, index_q = (x[part][count - seen :].transpose(0, 1)[None] for x in queries)
        k, v, index_k = (x.transpose(0, 1)[None] for x in keys)
        settings = {"block_size": step.page_size, "backend": "reference"}
        chosen = None
        if ids is not None:
            chosen = flexmsa.select_blocks(index_q.double(), index_k.double(), **settings, **step.rule)
            assert torch.equal(ids[count - seen :], chosen[0].transpose(0, 1))
        exact, baseline = (attend((x.to(dtype) for x in (q, k, v)), chosen, settings) for dtype in (FP64, step.dtype))
        assert_close("out", out[count - seen :], exact[0], baseline[0])
        assert_close("lse", lse[count - seen :], exact[1], baseline[1], terms=product_size(q, k))
    assert (found[0][first:] == 0).all() and (found[1][first:] == -torch.inf).all()


def attend(tensors, ids, settings):
    """out [n, Hq, D] and lse [n, Hq] of the definition; ids None: every block."""
    q, k, v = tensors
    out, aux = flexmsa.block_sparse_attention(q, k, v, ids, **settings, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


def check_alone(step, queries, pools, batch, found, backend):
    """Selection alone, and attention alone, give the same bits."""
    q, index_q = queries
    ids = torch.full((step.num_tokens, 2 * step.num_kv_heads, step.topk), 7, dtype=torch.int32)[:, 1::2]
    assert flexmsa.select_pages(index_q, pools, batch, **step.rule, out=ids, backend=backend) is ids
    assert torch.equal(ids, found[1])
    alone = flexmsa.attend_pages(q, None, pools, batch, block_indices=ids, backend=backend)
    assert_close("out", alone, found[0], found[0])
