"""The checks of user input that read no values from a device: shapes, dtypes, devices and settings.

Each message says `name: expected ..., got ...`, then how to correct it. Checks of values (ids in range, increasing
offsets) are in flexmsa.ops.checks, where they also run under torch.compile. One exception: `check_kv_starts` reads
values, once per cache.
"""

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmsa.kernels.problem import SCALE_DTYPES
from flexmsa.kernels.rules import MOST_INT8_DIMS
from flexmsa.types import AuxRequest

if TYPE_CHECKING:
    from flexmsa.cache import Cache

_INDEX_DTYPES = (torch.int32, torch.int64)
_E4M3 = torch.float8_e4m3fn


def reject_forward_ad(*tensors: Tensor) -> None:
    """Raise if a tensor has a forward-mode tangent: custom operators have no rule for it, so a jvp would be zero."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if isinstance(x, Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError("forward-mode differentiation (jvp) is not supported; use reverse mode")


def reject_context_parallel() -> None:
    """Raise inside torch's `context_parallel()`, which cuts tensors and replaces only PyTorch's own attention."""
    module = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    # Functions that were replaced stay in the list after the region's end.
    replaced = getattr(module, "_replaced_functions", ())
    if not torch.compiler.is_compiling() and F.scaled_dot_product_attention in replaced:
        raise RuntimeError(
            "flexmsa inside torch's context_parallel(): it would take this process's part as the whole sequence; use "
            "flexmsa.distributed.SequenceShards outside of it, with context_parallel_attention or a model's `shards`"
        )


def reject_gradients(**tensors: Tensor | None) -> None:
    """Raise if autograd would expect gradients of what goes into a cache, or is attended to it: they would be lost."""
    if not torch.is_grad_enabled():
        return
    wrong = [name for name, x in tensors.items() if isinstance(x, Tensor) and x.requires_grad]
    if wrong:
        raise RuntimeError(
            f"{', '.join(wrong)}: expected no gradient with a cache, which is for inference and would lose it, got "
            "requires_grad=True; call under torch.no_grad() or torch.inference_mode(), pass detached tensors, or train "
            "without a cache"
        )


def check_int(name: str, value: object, least: int, advice: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}{advice}")
    if value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value}{advice}")


def check_settings(
    block_size: int, topk: int | None = None, num_local_blocks: int = 1, num_init_blocks: int = 0
) -> None:
    check_int("block_size", block_size, 1)
    check_int("num_local_blocks", num_local_blocks, 1, "; a query's own block is always selected")
    check_int("num_init_blocks", num_init_blocks, 0)
    if topk is None:
        return
    check_int("topk", topk, 1, "; pass topk=None for the dense warm-up")
    if num_local_blocks + num_init_blocks > topk:
        raise ValueError(
            f"topk: expected room for the {num_local_blocks} local and {num_init_blocks} initial blocks that are "
            f"always selected, got topk={topk}; increase topk or force fewer blocks"
        )


def check_scale(name: str, scale: float | None) -> None:
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"{name}: expected a float or None, got {type(scale).__name__}")


def _check_is_tensor(name: str, x: object, layout: str = "") -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor{layout}, got {type(x).__name__}")


def _check_device(name: str, x: Tensor, device: torch.device, owner: str = "") -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected the device {owner}{device}, got {x.device}")


def _check_tensor(name: str, x: Any, layout: str, *eight_bits: torch.dtype) -> None:
    """Check dimensions and dtype; eight_bits: dtypes of 8 bits that are allowed."""
    _check_is_tensor(name, x, f" {layout}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions {layout}, got {x.dim()} of shape {list(x.shape)}")
    if x.dtype in eight_bits:
        return
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dtype.itemsize == 1:
        also = "".join(f", or {str(dtype).removeprefix('torch.')}" for dtype in eight_bits)
        hint = "; select_blocks and the caches take e4m3" if x.dtype == _E4M3 else ""
        raise TypeError(f"{name}: expected a floating dtype of 16 bits or more{also}, got {x.dtype}; cast it{hint}")


def _check_alike(tensors: dict[str, Tensor]) -> None:
    """Check that all have one device and, unless autocast will cast them, one dtype."""
    (first, reference), *others = tensors.items()
    for name, x in others:
        _check_device(name, x, reference.device, f"of {first}, ")
        if x.dtype != reference.dtype and not torch.is_autocast_enabled(reference.device.type):
            _check_same_dtype(name, x, first, reference)


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], layout: str) -> None:
    if x.shape != expected:
        raise ValueError(f"{name}: expected {layout} = {list(expected)}, got {list(x.shape)}")


def check_main_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    _check_tensor("q", q, "[B, Hq, Sq, D]")
    _check_tensor("k", k, "[B, Hkv, Sk, D]")
    _check_tensor("v", v, "[B, Hkv, Sk, D]")
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1], k.shape[2]
    if seqlen_q < 1 or seqlen_k < 1:
        raise ValueError(f"q, k: expected at least one query and one key, got Sq={seqlen_q}, Sk={seqlen_k}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"q: expected heads in groups, Hq a multiple of Hkv={num_kv_heads}, got Hq={num_heads}; "
            "the layout is [B, H, S, D]"
        )
    check_shape("k", k, (batch, num_kv_heads, seqlen_k, head_dim), "[B, Hkv, Sk, D] with q's B and D")
    check_shape("v", v, k.shape, "the shape of k")
    _check_alike({"q": q, "k": k, "v": v})
    check_scale("scale", scale)


def check_index_inputs(index_q: Tensor, index_k: Tensor, index_scale: float | None = None, e4m3: bool = False) -> None:
    eight_bits = (_E4M3,) if e4m3 else ()
    _check_tensor("index_q", index_q, "[B, Hkv, Sq, Di]", *eight_bits)
    _check_tensor("index_k", index_k, "[B, 1, Sk, Di]", *eight_bits)
    batch, _, seqlen_q, head_dim = index_q.shape
    seqlen_k = index_k.shape[2]
    if seqlen_q < 1 or seqlen_k < 1:
        raise ValueError(f"index_q, index_k: expected at least one query and one key, got {seqlen_q} and {seqlen_k}")
    layout = "[B, 1, Sk, Di], one head for all groups, index_q's B and Di"
    check_shape("index_k", index_k, (batch, 1, seqlen_k, head_dim), layout)
    _check_alike({"index_q": index_q, "index_k": index_k})
    check_scale("index_scale", index_scale)


def check_branches_match(q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor) -> None:
    batch, _, seqlen_q, _ = q.shape
    expected = (batch, k.shape[1], seqlen_q, index_q.shape[3])
    check_shape("index_q", index_q, expected, "[B, Hkv, Sq, Di], one head for each KV head of k")
    check_shape("index_k", index_k, (batch, 1, k.shape[2], index_q.shape[3]), "[B, 1, Sk, Di] with k's Sk")
    _check_alike({"q": q, "index_q": index_q})


def check_block_indices(
    block_indices: Tensor, batch: int, num_kv_heads: int, seqlen_q: int, device: torch.device
) -> None:
    _check_is_tensor("block_indices", block_indices)
    if block_indices.dtype not in _INDEX_DTYPES:
        raise TypeError(f"block_indices: expected int32 or int64, got {block_indices.dtype}")
    if block_indices.dim() != 4 or block_indices.shape[3] < 1:
        raise ValueError(f"block_indices: expected [B, Hkv, Sq, topk], got {list(block_indices.shape)}")
    expected = (batch, num_kv_heads, seqlen_q, block_indices.shape[3])
    check_shape("block_indices", block_indices, expected, "[B, Hkv, Sq, topk]")
    _check_device("block_indices", block_indices, device)


def check_lengths(name: str, lengths: Tensor, device: torch.device) -> None:
    _check_is_tensor(name, lengths)
    if lengths.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name}: expected int32, got {lengths.dtype}")
    _check_device(name, lengths, device)


def check_aux(return_aux: AuxRequest | None) -> AuxRequest:
    """Return `return_aux`, or a request for nothing if it is None."""
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"return_aux: expected an AuxRequest, such as AuxRequest(lse=True), got {return_aux!r}")
    return return_aux or AuxRequest()


def check_lse(lse: Tensor, q: Tensor) -> None:
    _check_is_tensor("lse", lse)
    check_shape("lse", lse, tuple(q.shape[:3]), "[B, Hq, Sq]")
    if lse.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lse: expected float32, as block_sparse_attention returns it, got {lse.dtype}")


def check_block_mask_inputs(block_indices: Tensor, num_heads: int, seqlen_k: int, block_size: int) -> None:
    check_settings(block_size)
    if not isinstance(block_indices, Tensor) or block_indices.dim() != 4:
        raise ValueError("block_indices: expected a tensor [B, Hkv, Sq, topk]")
    batch, num_kv_heads, seqlen_q, _ = block_indices.shape
    check_block_indices(block_indices, batch, num_kv_heads, seqlen_q, block_indices.device)
    check_int("seqlen_k", seqlen_k, 1)
    check_int("num_heads", num_heads, 1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads: expected a multiple of block_indices' {num_kv_heads} KV heads, got {num_heads}")


def check_cache_sizes(batch_size: int, num_kv_heads: int, head_dim: int, index_head_dim: int, **more: int) -> None:
    heads = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "index_head_dim": index_head_dim}
    for name, size in {"batch_size": batch_size, **heads, **more}.items():
        check_int(name, size, 1)


def check_cache_dtypes(dtype: torch.dtype, index_dtype: torch.dtype, index_head_dim: int) -> None:
    kept = (torch.float32, torch.float64, torch.bfloat16, torch.float16, _E4M3)
    hint = "; index_dtype takes int8" if dtype == torch.int8 else ""
    for name, chosen, allowed in (("dtype", dtype, kept), ("index_dtype", index_dtype, (*kept, torch.int8))):
        if chosen not in allowed:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {chosen}{hint}")
    _check_int8_dims(index_dtype, index_head_dim)


def _check_int8_dims(dtype: torch.dtype, dims: int) -> None:
    if dtype == torch.int8 and dims > MOST_INT8_DIMS:
        hint = "keep them in float8_e4m3fn or in 16 bits"
        raise ValueError(f"index_head_dim: expected at most {MOST_INT8_DIMS} for int8 index keys, got {dims}; {hint}")


def check_kv_starts(kv_starts: Tensor, batch_size: int, capacity: int, device: torch.device) -> None:
    check_lengths("kv_starts", kv_starts, device)
    check_shape("kv_starts", kv_starts, (batch_size,), "[B]")
    wrong = [start for start in kv_starts.tolist() if not 0 <= start <= capacity]
    if wrong:
        raise ValueError(f"kv_starts: expected 0 to {capacity} (the capacity) in each row, got {wrong[0]}")


def check_rows(name: str, rows: list[int], batch_size: int) -> None:
    if not isinstance(rows, list) or not all(isinstance(row, int) and 0 <= row < batch_size for row in rows):
        raise ValueError(f"{name}: expected a list of rows from 0 to {batch_size - 1}, got {rows}")


def check_cache_input(name: str, new: Tensor, buffer: Tensor, tokens: tuple[int, int]) -> None:
    """Check new tokens of a cache; `tokens` is (B, n), heads and head dim must be those of the buffer."""
    _check_tensor(name, new, "[B, H, tokens, D]")
    batch, count = tokens
    heads, head_dim = buffer.shape[1], buffer.shape[3]
    check_shape(name, new, (batch, heads, count, head_dim), "[B, H, tokens, D] of the cache")
    _check_device(name, new, buffer.device, "of the cache, ")
    if new.dtype != buffer.dtype and buffer.element_size() > 1:
        raise TypeError(
            f"{name}: expected the dtype of the cache, {buffer.dtype}, got {new.dtype}; make the cache with this dtype "
            "(under autocast, the region's), or cast"
        )


def check_decode_inputs(
    q: Tensor, index_q: Tensor | None, cache: "Cache", block_size: int, scale: float | None
) -> None:
    _check_tensor("q", q, "[B, Hq, Sq, D]")
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads = cache.k.shape[1]
    if batch != cache.batch_size or head_dim != cache.k.shape[3] or num_heads % num_kv_heads or seqlen_q < 1:
        raise ValueError(
            f"q: expected [B={cache.batch_size}, Hq a multiple of {num_kv_heads}, Sq >= 1, D={cache.k.shape[3]}] for "
            f"this cache, got {list(q.shape)}"
        )
    tensors = {"q": q}
    if index_q is not None:
        _check_tensor("index_q", index_q, "[B, Hkv, Sq, Di]")
        expected = (batch, num_kv_heads, seqlen_q, cache.index_k.shape[3])
        check_shape("index_q", index_q, expected, "[B, Hkv, Sq, Di] for q and this cache")
        if cache.index_k_scale is None:
            _check_same_dtype("index_q", index_q, "the cache's index keys", cache.index_k)
        tensors["index_q"] = index_q
    for name, x in tensors.items():
        _check_device(name, x, cache.k.device, "of the cache, ")
    if cache.k_scale is None:
        _check_same_dtype("q", q, "the cache's keys", cache.k)
    check_scale("scale", scale)
    if cache.block_size not in (None, block_size):
        raise ValueError(f"block_size: expected that by which the cache is cut, {cache.block_size}, got {block_size}")
    if cache.page_table is not None and cache.k.shape[2] != block_size:
        raise ValueError(
            f"block_size: expected the page size of the cache, {cache.k.shape[2]}, got {block_size}; make the cache "
            "with page_size=block_size"
        )


def _check_same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}; cast one of them")


def check_row_counts(name: str, counts: Tensor | None, kv_lens: Tensor) -> None:
    if counts is not None:
        check_lengths(name, counts, kv_lens.device)
        check_shape(name, counts, tuple(kv_lens.shape), "[B]")


def check_pools(pools: dict[str, Tensor], scales: dict[str, Tensor | None]) -> None:
    """Check the keys, values and index keys of a paged cache, and the scales of e4m3 and int8 pools."""
    for name, pool in pools.items():
        int8 = (torch.int8,) if name == "index_k" else ()
        _check_tensor(name, pool, "pages [num_pages, heads, page_size, D]", _E4M3, *int8)
    k, v, index_k = pools.values()
    _check_int8_dims(index_k.dtype, index_k.shape[3])
    if v.shape != k.shape or (index_k.shape[0], index_k.shape[2]) != (k.shape[0], k.shape[2]) or index_k.shape[1] != 1:
        raise ValueError(
            "k, v, index_k: expected [num_pages, Hkv, page_size, D] twice and [num_pages, 1, page_size, Di], "
            f"got {list(k.shape)}, {list(v.shape)} and {list(index_k.shape)}"
        )
    _check_same_dtype("v", v, "k", k)
    if not k.device == v.device == index_k.device:
        raise ValueError(f"k, v, index_k: expected one device, got {k.device}, {v.device} and {index_k.device}")
    for (name, scale), pool in zip(scales.items(), pools.values(), strict=True):
        if scale is not None:
            _check_pool_scale(name, scale, pool)


def _check_pool_scale(name: str, scale: Any, pool: Tensor) -> None:
    _check_is_tensor(name, scale, " [num_pages, heads, page_size]")
    kind, wanted = "int8" if pool.dtype == torch.int8 else "e4m3", SCALE_DTYPES.get(pool.dtype, torch.uint8)
    is_right = scale.dtype == wanted and scale.device == pool.device and scale.is_contiguous()
    if pool.dtype not in SCALE_DTYPES or not is_right:
        raise TypeError(
            f"{name}: expected {str(wanted).removeprefix('torch.')} on {pool.device}, contiguous, for an {kind} pool, "
            f"got {scale.dtype} on {scale.device} with strides {list(scale.stride())} for {pool.dtype}"
        )
    check_shape(name, scale, tuple(pool.shape[:-1]), "[num_pages, heads, page_size]")


def check_page_table(page_table: Tensor, kv_lens: Tensor, device: torch.device) -> None:
    check_lengths("page_table", page_table, device)
    check_lengths("kv_lens", kv_lens, device)
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or not page_table.is_contiguous():
        raise ValueError(
            f"page_table: expected contiguous int32 [B, max_pages], got {page_table.dtype} {list(page_table.shape)}"
        )
    check_shape("kv_lens", kv_lens, (page_table.shape[0],), "[B] with page_table's B")
    if kv_lens.dtype != torch.int32 or not kv_lens.is_contiguous():
        raise TypeError(
            f"kv_lens: expected contiguous int32, to be updated in place, got {kv_lens.dtype} with stride "
            f"{kv_lens.stride(0)}"
        )
