"""Generation by transformers models on a GPU: milliseconds per token, and whether anything compiles after the first.

    python -m benchmarks.gpu_generation [--lengths 8192 ...] [--out FILE]

Two models with random weights in bf16, batch 1: layers of MiniMax-M3's heads, and a converted model with the shape of
Qwen3-0.6B; beside each, the same model with dense attention through scaled_dot_product_attention. A token is generated
eagerly from a DynamicCache, and from a StaticCache by a step that torch.compile has captured in a CUDA graph. The
caches are filled with random keys and values, and each token is waited for, as `generate` does.

First two checks: a cache that grows from one token compiles nothing after its first steps, and the captured step gives
the logits of the eager one.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, DynamicCache, MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks import gpu_model
from flexmsa.integrations.transformers import register
from flexmsa.integrations.transformers.attention import IMPLEMENTATION
from flexmsa.kernels.triton.common.launch import compiled_keys

LENGTHS = (8192, 32768, 131072)
# Bars: milliseconds of the host in the attention function of a layer; captured steps are no slower than dense ones.
EAGER_BAR, LEAST_RATIO = 0.4, 1.0
TOKENS, WARM_UP = 24, 6
# Room for the tokens that are timed.
SPARE = 256
# Lengths that a cache grows to: the first tokens, round the first blocks, and where the keys are split further.
GROWTH = (1, 2, 3, 17, 127, 128, 129, 255, 256, 700, 1024, 2048, 2100, 4096, 5200, 8192, 20000, 40000, 131072)
EAGER, CAPTURED = "eager", "captured"
# Of the dense models. cuDNN makes a plan for each new length: 10 to 15 ms per layer and token of a DynamicCache. With
# the fixed length of a captured step it is the fastest.
PLAIN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
KERNELS = {EAGER: PLAIN, CAPTURED: [*PLAIN, SDPBackend.CUDNN_ATTENTION]}


@dataclass(frozen=True)
class Shape:
    """A model; converted: a dense model that `convert` changes, else MiniMax-M3."""

    converted: bool
    layers: int
    device: str = "cuda"
    hidden: int = 2048
    heads: int = 64
    kv_heads: int = 4
    head_dim: int = 128
    block_size: int = 128
    topk: int = 16


SHAPES = {"MiniMax-M3, 4 layers": Shape(False, 4), "Qwen3-0.6B, 8 layers": Shape(True, 8)}


def make(shape: Shape, dense: bool) -> Any:
    """The model, or its twin with dense attention in every layer."""
    if shape.converted:
        sizes: dict[str, Any] = {
            "layers": shape.layers,
            "block_size": shape.block_size,
            "topk": shape.topk,
            "device": shape.device,
        }
        if shape.device == "cpu":
            sizes |= {"hidden": 64, "mlp": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}
        model_shape = replace(gpu_model.SHAPE, **sizes)
        made = gpu_model.make_dense(model_shape) if dense else gpu_model.make_sparse(model_shape)
        made.gradient_checkpointing_disable()
        made.disable_input_require_grads()
    else:
        made = make_m3(shape, dense)
    return made.eval()


def make_m3(shape: Shape, dense: bool) -> Any:
    register()
    config = MiniMaxM3VLTextConfig(
        vocab_size=512,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        dense_intermediate_size=shape.hidden,
        mlp_layer_types=["dense"] * shape.layers,
        layer_types=["full_attention" if dense else "minimax_m3_sparse"] * shape.layers,
        index_n_heads=shape.kv_heads,
        index_head_dim=shape.head_dim,
        index_block_size=shape.block_size,
        index_topk_blocks=shape.topk,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    torch.manual_seed(0)
    with torch.device(shape.device):
        made = MiniMaxM3VLForCausalLM(config).bfloat16()
    made.set_attn_implementation("sdpa" if dense else "flexmsa")
    return made


def filled_cache(model: Any, length: int, capacity: int | None) -> Any:
    """A cache of `length` random tokens: a StaticCache with room for `capacity`, or without one a DynamicCache."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if capacity is None else StaticCache(config=config, max_cache_len=capacity)
    model(torch.ones(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    torch.manual_seed(length)
    for layer in cache.layers:
        for name, x in list(vars(layer).items()):
            if not isinstance(x, Tensor):
                continue
            if not x.is_floating_point():
                x.fill_(length)
            elif capacity is None:
                shape = (*x.shape[:-2], length, x.shape[-1])
                setattr(layer, name, torch.randn(shape, dtype=x.dtype, device=x.device))
            else:
                filled = x.narrow(-2, 0, length)
                filled.copy_(torch.randn(filled.shape, dtype=x.dtype, device=x.device))
    return cache


class Generator:
    """Generates greedily from a filled cache, one token at a time."""

    def __init__(self, model: Any, way: str, length: int) -> None:
        self.model, self.length = model, length
        captured = way == CAPTURED
        self.kernels = KERNELS[way]
        self.cache = filled_cache(model, length, length + SPARE if captured else None)
        self.forward: Callable[..., Any] = model
        if captured:
            self.forward = torch.compile(model, mode="reduce-overhead", fullgraph=True)
        self.token = torch.ones(1, 1, dtype=torch.long, device=model.device)

    def logits(self) -> Tensor:
        """Of the next token, which becomes part of the cache."""
        position = torch.full_like(self.token, self.length)
        self.length += 1
        with torch.no_grad(), sdpa_kernel(self.kernels):
            return self.forward(input_ids=self.token, position_ids=position, past_key_values=self.cache).logits

    def step(self) -> None:
        self.token = self.logits()[:, -1:].argmax(-1).clone()
        int(self.token)

    def times(self) -> list[float]:
        """Milliseconds of each of some tokens."""
        found = []
        for _ in range(WARM_UP + TOKENS):
            start = perf_counter()
            self.step()
            found.append((perf_counter() - start) * 1e3)
        return found[WARM_UP:]


def growth_errors(name: str, model: Any) -> Iterator[str]:
    """Kernels that compile while a cache grows, after its first token."""
    known: set[Any] = set()
    for length in GROWTH:
        Generator(model, EAGER, length).step()
        new = compiled_keys() - known
        if known and new:
            yield f"{name}: {length} keys: compiled {sorted(key[0].__name__ for key in new)}"
        known |= new
    print(f"{name}: {len(known)} kernels for caches of {GROWTH[0]} to {GROWTH[-1]} keys", flush=True)


def capture_errors(name: str, shape: Shape, length: int = 3000) -> Iterator[str]:
    """Logits of the captured step that are further from the eager one's than those of the dense model.

    Every block is selected: rounding decides between blocks whose random scores are almost equal.
    """
    shape = replace(shape, layers=2, topk=length // shape.block_size + 2)
    errors = []
    for dense in (True, False):
        model = make(shape, dense)
        eager, captured = (
            torch.stack([generator.logits().float().clone() for _ in range(4)])
            for generator in (Generator(model, way, length) for way in (EAGER, CAPTURED))
        )
        errors.append(float((eager - captured).norm() / eager.norm()))
    said = f"{name}: captured logits are off by {errors[1]:.1e}, those of the dense model by {errors[0]:.1e}"
    print(said, flush=True)
    if not errors[1] <= 2 * errors[0]:
        yield said


class AttentionTimer:
    """Inside, notes the host's milliseconds in each call of the attention function; it does not wait for the GPU."""

    def __enter__(self) -> "AttentionTimer":
        self.ms: list[float] = []
        self.attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        AttentionInterface.register(IMPLEMENTATION, self.timed)
        return self

    def __exit__(self, *error: object) -> None:
        AttentionInterface.register(IMPLEMENTATION, self.attend)

    def timed(self, *args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        result = self.attend(*args, **kwargs)
        self.ms.append((perf_counter() - start) * 1e3)
        return result


def host_errors(name: str, model: Any, length: int, report: Callable[[dict[str, Any]], None]) -> Iterator[str]:
    """Report the host's time in flexmsa's attention function, per layer of an eager step; too much is wrong.

    Hosts differ by a factor of three: op_us is the time of the smallest operation of PyTorch.
    """
    generator = Generator(model, EAGER, length)
    generator.times()
    with AttentionTimer() as timer:
        generator.times()
    ms = median(timer.ms)
    row = {"model": name, "keys": length, "kind": "attention function", "way": EAGER, "ms": ms, "bar": EAGER_BAR}
    report({**row, "op_us": operation_us(model.device)})
    if ms > EAGER_BAR:
        yield f"{name}: the attention function takes the host {ms:.2f} ms per layer, more than {EAGER_BAR}"


def operation_us(device: torch.device, calls: int = 1000) -> float:
    x = torch.zeros(8, device=device)
    times = []
    for _ in range(5):
        start = perf_counter()
        for _ in range(calls):
            x + 1
        times.append((perf_counter() - start) / calls * 1e6)
    return median(times)


def measure(name: str, shape: Shape, lengths: list[int], report: Callable[[dict[str, Any]], None]) -> list[str]:
    """Check and time one model; return what is wrong."""
    errors: list[str] = []
    found: dict[tuple[str, int], float] = {}
    for kind in ("flexmsa", "dense"):
        model = make(shape, dense=kind == "dense")
        if kind == "flexmsa":
            errors += [*growth_errors(name, model), *capture_errors(name, shape)]
        for length in lengths:
            for way in (EAGER, CAPTURED):
                torch._dynamo.reset()
                times = Generator(model, way, length).times()
                row = {"model": name, "layers": shape.layers, "keys": length, "kind": kind, "way": way}
                report({**row, "ms": median(times), "slowest_ms": max(times)})
                torch.cuda.empty_cache()
                if kind == "flexmsa":
                    found[way, length] = median(times)
                elif way == CAPTURED and median(times) < LEAST_RATIO * found[way, length]:
                    errors.append(f"{name}: {length} keys: the captured step takes longer than the dense one")
        if kind == "flexmsa":
            errors += host_errors(name, model, lengths[0], report)
        del model
    return errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_generation", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="keys in the cache")
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="MODEL")
    parser.add_argument("--out", type=Path, help="a JSON file to write after every row")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_generation needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    import transformers
    import triton

    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    rows: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        print("{model:22} {keys:7} {kind:18} {way:9} {ms:8.2f} ms".format(**row), flush=True)
        if options.out:
            options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))

    errors = [error for name in options.models for error in measure(name, SHAPES[name], options.lengths, report)]
    print(*errors or ["all checks passed"], sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
