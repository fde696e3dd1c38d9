"""A training step of a whole model on a GPU: a part of `benchmarks/gpu.py`.

A causal model of transformers with the shape of Qwen3-0.6B, random weights and a small vocabulary, in bf16, batch 1,
with activation checkpointing: dense through scaled_dot_product_attention, then converted, in the sparse phase. A step
is forward and backward of `outputs.loss`, the index loss included. Memory is the most that torch allocated, weights and
gradients included.

First the gradients of a shorter model are compared with those of the plainest way: no checkpointing, and the index loss
in the forward. The profile of one layer is printed: kernels by their share of the GPU's time, and the operators that
take more time than in the dense layer.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from flexmsa import save_attention_policy

# Tokens -> how many times faster than dense, and in how many GiB.
BARS = {32768: (1.6, 12.0), 131072: (4.2, 45.0)}
DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
# What activation checkpointing saves of a layer: by default the selected blocks, or the main branch's results too.
CHECKPOINTING = {
    "flexmsa": None,
    "flexmsa, attention saved": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, save_attention_policy),
    },
}
Milliseconds = Mapping[Any, float]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and of its selection."""

    layers: int = 28
    hidden: int = 1024
    mlp: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 128
    topk: int = 16
    vocabulary: int = 512
    device: str = "cuda"


SHAPE = Shape()


def has_transformers() -> bool:
    """Whether transformers is installed; if not, say what to install."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        print(f"no rows of a model ({error}): pip install flexmsa[transformers]", flush=True)
        return False
    return True


def make_dense(shape: Shape) -> Any:
    """A checkpointed model in training mode, with the same weights each time."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(shape.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model.gradient_checkpointing_enable()
    return model


def make_sparse(shape: Shape) -> Any:
    """The same model, converted."""
    from flexmsa.integrations.transformers import begin_sparse, convert

    model = convert(make_dense(shape), {"block_size": shape.block_size, "topk": shape.topk})
    begin_sparse(model)
    return model


def tokens(shape: Shape, seqlen: int) -> Tensor:
    return torch.randint(shape.vocabulary, (1, seqlen), device=shape.device)


def step(model: Any, ids: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def index_losses(model: Any) -> Tensor | None:
    """Of the last step, by layer; None for a dense model."""
    return model.flexmsa.report.index_losses if hasattr(model, "flexmsa") else None


def step_errors(model: Any, loss: Tensor) -> Iterator[str]:
    """What is missing or not finite after a step."""
    by_layer = index_losses(model)
    for name, x in {"loss": loss, "index losses": by_layer}.items():
        if x is not None and not x.isfinite().all():
            yield f"{name}: {x.tolist()}"
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            yield f"{name}: {'no' if parameter.grad is None else 'not a finite'} gradient"


def model_errors(
    shape: Shape = SHAPE, layers: int = 3, seqlen: int = 4096, make: Callable[[Shape], Any] = make_sparse
) -> Iterator[str]:
    """Gradients and index losses that differ from those of the plainest way."""
    if not has_transformers():
        return
    shape = replace(shape, layers=layers)
    torch.manual_seed(1)
    ids = tokens(shape, seqlen)
    found: list[dict[str, Tensor]] = []
    for plain in (True, False):
        model = make(shape)
        if plain:
            model.gradient_checkpointing_disable()
            model.flexmsa.loss_in_backward = False
        loss = step(model, ids)
        yield from step_errors(model, loss)
        results = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**results, "index losses": index_losses(model)})
    expected, actual = found
    for name, x in expected.items():
        error = torch.linalg.vector_norm(actual[name].double() - x.double()) / torch.linalg.vector_norm(x.double())
        if not error < 2e-2:
            yield f"model, {name}: is off by {error:.1e}"


def time_step(model: Any, ids: Tensor, repeats: int) -> tuple[float | str, float]:
    """Median milliseconds of a step, or what is wrong with its results; and its peak memory in GiB."""
    on_gpu = ids.is_cuda
    times = []
    # Of earlier models, whose hooks refer to them.
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loss = torch.zeros(())
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize()
        start = perf_counter()
        loss = step(model, ids)
        if on_gpu:
            torch.cuda.synchronize()
        times.append((perf_counter() - start) * 1e3)
    gib = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    wrong = "; ".join(step_errors(model, loss))
    return wrong or median(times), gib


def model_times(
    report: Callable[..., None], lengths: list[int], shape: Shape = SHAPE, dense: dict[str, SDPBackend] | None = None
) -> None:
    """Report the steps of the dense model by each kernel in `dense`, and of the converted one, at each length."""
    best: dict[int, float] = {}
    model, one_layer = make_dense(shape), make_dense(replace(shape, layers=1))
    for name, backend in (DENSE if dense is None else dense).items():
        with sdpa_kernel(backend):
            for seqlen in lengths:
                ids = tokens(shape, seqlen)
                # A dense step of 128K tokens takes 20 seconds; one layer suffices for the plans of its kernels.
                step(one_layer, ids)
                ms, gib = time_step(model, ids, repeats=3 if seqlen < 100_000 else 1)
                report(f"model {seqlen}: dense {name}", ms, gib=gib)
                if isinstance(ms, float):
                    best[seqlen] = min(ms, best.get(seqlen, ms))
    del model, one_layer
    model = make_sparse(shape)
    for name, arguments in CHECKPOINTING.items():
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        for seqlen in lengths:
            ids = tokens(shape, seqlen)
            step(model, ids)
            ms, gib = time_step(model, ids, repeats=5 if seqlen < 100_000 else 3)
            more = {"ratio": best[seqlen] / ms} if isinstance(ms, float) and seqlen in best else {}
            if seqlen in BARS:
                more["ratio_bar"], more["gib_bar"] = BARS[seqlen]
            report(f"model {seqlen}: {name}", ms, gib=gib, **more)


def measured(model: Any, ids: Tensor) -> tuple[Milliseconds, Milliseconds]:
    """Milliseconds of a step by kernel, and by operator and shapes of its tensors; on a CPU by operator only."""
    step(model, ids)
    on_gpu = ids.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as found:
        step(model, ids)
        if on_gpu:
            torch.cuda.synchronize()

    def ms(event: Any) -> float:
        return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3

    def is_kernel(event: Any) -> bool:
        return event.device_type != torch.autograd.DeviceType.CPU

    kernels = {event.key: ms(event) for event in found.key_averages() if is_kernel(event)}
    operators: Counter[tuple[str, str]] = Counter()
    for event in found.key_averages(group_by_input_shape=True):
        if not is_kernel(event):
            operators[event.key, " ".join(str(shape) for shape in event.input_shapes if shape)] += ms(event)
    return kernels, operators


def profile_lines(seqlen: int, shape: Shape = SHAPE, rows: int = 15) -> Iterator[str]:
    """Where the time of a step of one layer goes."""
    shape = replace(shape, layers=1)
    ids = tokens(shape, seqlen)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if ids.is_cuda else nullcontext():
        _, dense = measured(make_dense(shape), ids)
    kernels, operators = measured(make_sparse(shape), ids)
    total = sum(kernels.values()) if kernels else sum(operators.values())
    yield f"one layer, {seqlen} tokens: {total:.2f} ms; kernels:"
    for name, ms in _largest(kernels, rows):
        yield f"{ms:10.2f} ms {ms / total:6.1%}  {name[:100]}"
    yield "operators that take more time than in the dense layer:"
    added = {key: ms - dense.get(key, 0.0) for key, ms in operators.items()}
    for (name, shapes), ms in _largest(added, rows):
        yield f"{ms:10.2f} ms {ms / total:6.1%}  {name} {shapes[:120]}"


def _largest(times: Milliseconds, rows: int) -> list[tuple[Any, float]]:
    return sorted(times.items(), key=lambda item: -item[1])[:rows]
