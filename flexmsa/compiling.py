"""Compiling ahead, when asked for: the Triton kernels of a shape, before the first step needs them.

`python -m flexmsa warm-up --help` does it from the shell.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from flexmsa import validation
from flexmsa._progress import Progress
from flexmsa.config import MSAConfig

__all__ = ["main", "warm_up"]

# Queries of a step that decodes a token, and of a chunk of a prompt.
STEPS = 1, 1024
# The exit code of a command that Ctrl-C stopped.
INTERRUPTED = 130


def warm_up(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    index_head_dim: int | None = None,
    block_size: int = 128,
    topk: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = True,
    packed: bool = False,
    decoding: bool = False,
    paged: bool = False,
    cache_dtype: torch.dtype | None = None,
    index_dtype: torch.dtype | None = None,
    device: str | torch.device = "cuda",
    report: Callable[[int, int, str], object] = lambda done, total, name: None,
) -> int:
    """Compile the Triton kernels of one shape, side by side on all cores, so that the first step need not.

    Nothing has to be compiled ahead: the first step of a shape does it, in the same way. This is for a job whose first
    step must be fast, and for building an image: Triton keeps what was compiled on disk, by default in ~/.triton/cache,
    for every later process on this kind of GPU.

    Args:
        num_heads, num_kv_heads: Hq and Hkv.
        head_dim, index_head_dim: D and Di; None for Di = D.
        block_size, topk: as for `flexmsa.attention`.
        dtype: of all inputs.
        training: compile for `flexmsa.attention` and its backward with the index loss, for every length.
        packed: compile for `cu_seqlens` of several documents.
        decoding: compile for the append to a cache and `flexmsa.decode`, for single tokens and for chunks of a prompt.
        paged, cache_dtype: the caches to decode from: in pages of block_size; None stores dtype, or
            torch.float8_e4m3fn.
        index_dtype: of their index keys; None is cache_dtype's, or torch.float8_e4m3fn or torch.int8.
        device: the GPU to compile for.
        report: called after each kernel with how many are done, of how many, and its name.

    Returns:
        The number of kernels that were compiled or read from Triton's cache; 0 if this process had all of them.

    Raises:
        ValueError, TypeError: a size or a dtype is not supported.
        RuntimeError: there is no GPU, or no Triton.

    >>> if torch.cuda.is_available():
    ...     print(warm_up(num_heads=64, num_kv_heads=4, head_dim=128), "kernels are ready")
    """
    index_head_dim = head_dim if index_head_dim is None else index_head_dim
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    sizes = {**heads, "head_dim": head_dim, "index_head_dim": index_head_dim, "block_size": block_size}
    _check(topk=topk, dtype=dtype, cache_dtype=cache_dtype, index_dtype=index_dtype, **sizes)
    _check_device(device)
    from flexmsa.kernels.triton.common.launch import compile_ahead
    from flexmsa.kernels.triton.layer import CacheFormat, Layer, decode, train
    from flexmsa.kernels.triton.step import recorded_tokens

    def calls() -> Iterator[Callable[[], object]]:
        shape = (
            recorded_tokens(block_size),
            num_heads,
            num_kv_heads,
            head_dim,
            index_head_dim,
            block_size,
            topk,
            dtype,
            packed,
        )
        layer = Layer(*shape, device=str(device))
        e4m3 = torch.float8_e4m3fn
        cache = CacheFormat(paged, cache_dtype == e4m3, index_dtype or (e4m3 if cache_dtype == e4m3 else None))
        if training:
            yield from (partial(train, layer, loss_in_backward) for loss_in_backward in (False, True))
        if decoding:
            yield from (partial(decode, layer, cache, queries) for queries in STEPS)

    with torch.cuda.device(device):
        return compile_ahead(calls(), report)


def _check(
    *, topk: int, dtype: torch.dtype, cache_dtype: torch.dtype | None, index_dtype: torch.dtype | None, **sizes: Any
) -> None:
    MSAConfig(hidden_size=1, topk=topk, rotary_dim=0, **sizes)
    validation.check_int("topk", topk, 1)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
    if cache_dtype not in (None, dtype, torch.float8_e4m3fn):
        raise ValueError(f"cache_dtype: expected None, {dtype} or torch.float8_e4m3fn, got {cache_dtype}")
    if index_dtype not in (None, torch.float8_e4m3fn, torch.int8):
        raise ValueError(f"index_dtype: expected None, torch.float8_e4m3fn or torch.int8, got {index_dtype}")


def _check_device(device: str | torch.device) -> None:
    """Raise unless kernels can be compiled for `device`."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("warm_up compiles Triton kernels, and Triton is not installed: pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("warm_up compiles Triton kernels, and TRITON_INTERPRET=1 interprets them: unset it")
    if not torch.cuda.is_available():
        raise RuntimeError("warm_up compiles for a GPU, and torch finds none: torch.cuda.is_available() is False")
    if torch.device(device).type != "cuda":
        raise ValueError(f"device: expected a GPU, as in 'cuda', got {device}")


def main(argv: list[str]) -> int:
    """Compile for one shape; returns 0, 1 where there is no GPU to compile for, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa warm-up",
        description="Compile the Triton kernels of one shape for this GPU, side by side on all cores. Triton keeps "
        "them on disk (TRITON_CACHE_DIR, ~/.triton/cache), so that the first step of a later process need not compile.",
    )
    for name in ("num-heads", "num-kv-heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--index-head-dim", type=int, default=None, help="default: the head dim")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--no-training", dest="training", action="store_false", help="do not compile for training")
    parser.add_argument("--packed", action="store_true", help="for packed documents (cu_seqlens)")
    parser.add_argument("--decoding", action="store_true", help="for a cache and decode")
    parser.add_argument("--paged", action="store_true", help="the cache is in pages")
    parser.add_argument("--cache-dtype", default=None, choices=["float8_e4m3fn"], help="default: the dtype")
    parser.add_argument("--index-dtype", default=None, choices=["float8_e4m3fn", "int8"], help="default: the cache's")
    parser.add_argument("--device", default="cuda")
    options = vars(parser.parse_args(argv))
    for name in ("dtype", "cache_dtype", "index_dtype"):
        options[name] = options[name] and getattr(torch, options[name])
    shown: list[Progress] = []

    def report(done: int, total: int, name: str) -> None:
        if not shown:
            shown.append(Progress(total))
        shown[0].update(done, name)

    try:
        count = warm_up(**options, report=report)
    except (RuntimeError, ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the kernels that are done stay in Triton's cache", file=sys.stderr)
        return INTERRUPTED
    finally:
        for progress in shown:
            progress.close()
    print(f"{count} kernels are ready")
    return 0
