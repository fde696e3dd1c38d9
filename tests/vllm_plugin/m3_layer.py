"""A sparse layer of vLLM's MiniMax-M3 on a CPU: vLLM's own code, but for the operator that only GPUs have."""

import importlib.util
import inspect
import sys
import types
import unittest.mock

import torch
from vllm.config import AttentionConfig, CacheConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from flexmsa import reference

if importlib.util.find_spec("torchvision") is None:
    # The processor of images, of which attention needs nothing.
    sys.modules["vllm.transformers_utils.processors.minimax_m3"] = unittest.mock.MagicMock()

import vllm.models.minimax_m3.nvidia.model as vllm_model
from vllm.models.minimax_m3.common.indexer import MiniMaxM3IndexerMetadata
from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3TextConfig

HEADS, KV_HEADS, DIM, PAGE, WIDTH = 4, 2, 128, 128, 64
TOKENS, PAGES, BLOCKS = 1024, 24, 8
SPARSE = {
    "sparse_index_dim": DIM,
    "sparse_num_index_heads": KV_HEADS,
    "sparse_topk_blocks": 3,
    "sparse_block_size": PAGE,
    "sparse_score_type": "max",
    "sparse_init_block": 1,
    "sparse_local_block": 1,
}
FP8 = torch.float8_e4m3fn
OPERATOR = "fused_minimax_m3_qknorm_rope_kv_insert"
SIGNATURE = inspect.signature(getattr(vllm_model.ops, OPERATOR))
SIZES = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM, DIM]
# Any value that no id has.
UNTOUCHED = 77


def insert(qkv, *positional, **named):
    """What the operator does with its pages, without norms and RoPE: queries to buffers, keys to slots."""
    given = types.SimpleNamespace(**SIGNATURE.bind(qkv, *positional, **named).arguments)
    q, k, v, index_q, index_k = qkv.split(SIZES, dim=-1)
    given.q_out.copy_(q)
    given.index_q_out.copy_(index_q)
    assert given.block_size == PAGE
    pages = given.kv_cache.view(FP8) if given.kv_cache_dtype == "fp8" else given.kv_cache
    for token, slot in enumerate(given.slot_mapping.tolist()):
        if slot >= 0:
            page, place = divmod(slot, PAGE)
            both = (x[token].unflatten(0, (KV_HEADS, DIM)) for x in (k, v))
            pages[page, :, place] = torch.cat(list(both), -1).to(pages.dtype)
    for token, slot in enumerate(given.index_slot_mapping.tolist()):
        if slot >= 0:
            given.index_cache[slot // PAGE, slot % PAGE] = index_k[token].to(given.index_cache.dtype)


class Layer:
    """A layer, its pages, and sequences whose tokens are computed step by step.

    lengths: of the sequences in the end. drafts: tokens after the first of a verified sequence. order: of the
    dimensions of the pages in memory. Others: settings of vLLM, and changes of `SPARSE`.
    """

    def __init__(self, lengths, drafts=0, order=(0, 1, 2, 3), kv_cache_dtype="auto", index_dtype="auto", **sparse):
        cache = CacheConfig(cache_dtype=kv_cache_dtype)
        self.config = VllmConfig(cache_config=cache, attention_config=AttentionConfig(indexer_kv_dtype=index_dtype))
        if drafts:
            numbers = types.SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
            self.config.speculative_config = numbers
        settings = {**SPARSE, **sparse}
        self.topk, self.settings = settings["sparse_topk_blocks"], settings
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
        model = MiniMaxM3TextConfig(hidden_size=WIDTH, **heads, sparse_attention_config=settings)
        self.ids = torch.full((TOKENS, KV_HEADS, self.topk), UNTOUCHED, dtype=torch.int32)
        with set_current_vllm_config(self.config):
            self.layer = vllm_model.MiniMaxM3SparseAttention(model, 3, None, "layers.3", cache, self.ids)
        for linear in (self.layer.qkv_proj, self.layer.o_proj):
            torch.nn.init.normal_(linear.weight, std=linear.weight.shape[1] ** -0.5)
            # vLLM would rearrange the weights.
            linear.cpu_linear = torch.nn.functional.linear
        # As the checkpoint's dtype is, were it not for a CPU.
        index_cache = self.layer.indexer.index_cache
        index_cache.dtype = torch.float32 if index_dtype == "auto" else index_cache.dtype
        self.bind(order, kv_cache_dtype, index_cache)
        spec = self.layer.get_kv_cache_spec(self.config)
        builder = self.layer.get_attn_backend().get_builder_cls()
        self.builder = builder(spec, [self.layer.layer_name], self.config, torch.device("cpu"))
        self.hidden = [torch.randn(length, WIDTH) for length in lengths]
        free = torch.randperm(PAGES, dtype=torch.int32)[: len(lengths) * BLOCKS]
        self.table = free.view(len(lengths), BLOCKS)
        self.done = [0] * len(lengths)

    def bind(self, order, kv_cache_dtype, index_cache):
        """Bind pages of garbage."""
        shape = PAGES, KV_HEADS, PAGE, 2 * DIM
        stored = torch.full([shape[dim] for dim in order], float("nan"))
        if kv_cache_dtype == "fp8":
            stored = stored.to(FP8).view(torch.uint8)
        self.layer.bind_kv_cache(stored.permute([order.index(dim) for dim in range(4)]))
        index_cache.bind_kv_cache(torch.full((PAGES, 1, PAGE, DIM), float("nan")).to(index_cache.dtype))

    def metadata(self, step, padding=0):
        """vLLM's metadata of a step [(sequence, tokens), ...], padding: more sequences, which a graph has."""
        tokens = [count for _, count in step] + [0] * padding
        most = max(tokens)
        starts = torch.tensor([0, *tokens], dtype=torch.int32).cumsum(0).int()
        lens = [self.done[row] + count for row, count in step] + [0] * padding
        slots = torch.full((sum(tokens) + padding * most,), -1)
        for (row, count), start in zip(step, starts.tolist(), strict=False):
            place = torch.arange(self.done[row], self.done[row] + count)
            slots[start : start + count] = self.table[row, place // PAGE].long() * PAGE + place % PAGE
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
            num_reqs=len(tokens),
            num_actual_tokens=len(slots),
            max_query_len=most,
            max_seq_len=max(lens),
            block_table_tensor=self.table[[row for row, _ in step] + [0] * padding],
            slot_mapping=slots,
        )

    def forward(self, step, given, built, extra=0):
        """vLLM's forward of a step's tokens and as many others; index keys have the slots of the keys."""
        index = {"num_decodes": 0, "num_decode_tokens": 0, "num_prefills": 0, "num_prefill_tokens": 0}
        more = {"max_seq_len": given.max_seq_len, "num_actual_tokens": given.num_actual_tokens}
        index = MiniMaxM3IndexerMetadata(given.seq_lens, slot_mapping=built.slot_mapping, **index, **more)
        hidden = torch.randn(given.num_actual_tokens + extra, WIDTH)
        tokens = [self.hidden[row][self.done[row] : self.done[row] + count] for row, count in step]
        hidden[: sum(map(len, tokens))] = torch.cat(tokens)
        names = self.layer.layer_name, self.layer.indexer.index_cache.prefix
        slots = torch.nn.functional.pad(given.slot_mapping, (0, extra), value=-1)
        metadata, slots = dict(zip(names, (built, index), strict=True)), dict.fromkeys(names, slots)
        operator = unittest.mock.patch.object(vllm_model.ops, OPERATOR, insert)
        with set_forward_context(metadata, self.config, slot_mapping=slots), operator:
            found = self.layer(torch.zeros(len(hidden), dtype=torch.int64), hidden)
        # They may be in the memory of a CUDA graph.
        assert self.layer.indexer.impl.queries is None
        return found

    def run(self, step, padding=0, extra=0):
        """Compute a step, and compare its output and blocks with the reference."""
        given = self.metadata(step, padding)
        built = self.builder.build(0, given)
        self.ids.fill_(UNTOUCHED)
        self.check(step, self.forward(step, given, built, extra), given.num_actual_tokens)

    def check(self, step, found, num_tokens):
        """Compare with the reference; the tokens then count as computed."""
        first = 0
        for row, count in step:
            new = slice(self.done[row], self.done[row] + count)
            expected, exact, ids = self.expected(row, new)
            part = slice(first, first + count)
            assert torch.equal(self.ids[part], ids)
            error = (found[part] - exact).abs().max()
            assert error <= 2 * (expected - exact).abs().max() + 1e-6
            first, self.done[row] = part.stop, new.stop
        assert (self.ids[first:num_tokens] == -1).all() and (self.ids[num_tokens:] == UNTOUCHED).all()
        assert (found[first:num_tokens] == 0).all()

    def expected(self, row, new):
        """out in float32 and in float64, and block_indices [n, Hkv, topk], of new tokens of a sequence."""
        hidden = self.hidden[row][: new.stop]
        heads = torch.nn.functional.linear(hidden, self.layer.qkv_proj.weight).split(SIZES, -1)
        q, k, v, index_q, index_k = (x.unflatten(-1, (-1, DIM)).transpose(0, 1)[None] for x in heads)
        if self.layer.kv_cache_dtype == "fp8":
            k, v = (x.to(FP8).to(x.dtype) for x in (k, v))
        if self.layer.indexer.index_cache.dtype == FP8:
            index_q, index_k = (x.to(FP8).to(x.dtype) for x in (index_q, index_k))
        q, index_q = q[:, :, new], index_q[:, :, new]
        start, end = torch.zeros(1, q.shape[2], dtype=torch.int64), torch.arange(new.start + 1, new.stop + 1)[None]
        forced = self.settings["sparse_local_block"], self.settings["sparse_init_block"]
        ids = reference.select_blocks(index_q.double(), index_k.double(), start, end, PAGE, self.topk, *forced)
        both = []
        for dtype in (torch.float32, torch.float64):
            queries, keys, values = (x.to(dtype) for x in (q, k, v))
            out, _ = reference.block_sparse_attention(queries, keys, values, ids, start, end, PAGE, DIM**-0.5)
            both.append(out[0].transpose(0, 1).flatten(1) @ self.layer.o_proj.weight.to(dtype).T)
        return *both, ids[0].transpose(0, 1)
