"""Generation with caches: prompts of different lengths in one batch, then one byte per step for every row."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa.cache import Cache
from flexmsa.demo.model import GPT

__all__ = ["Generated", "generate"]

Step = Callable[[Tensor], Tensor]


class Generated(NamedTuple):
    """Per prompt: the text (prompt and continuation), and the cached model's logits [bytes - 1, 256] of its bytes from
    the second on."""

    texts: list[bytes]
    logits: list[Tensor]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[bytes],
    length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    compiled: bool = False,
    select_every: int = 1,
) -> Generated:
    """Continue each prompt by `length` bytes.

    One call reads all prompts, each row with its own number of bytes. Every later step does the same work on the same
    memory: on a GPU it is captured once as a CUDA graph and replayed.

    Args:
        prompts: at least one byte each.
        temperature: divides the logits; 0 takes the best byte each time.
        generator: source of random numbers, on the CPU.
        compiled: run the step through torch.compile.
        select_every: as for `GPT.read`.

    Raises:
        ValueError: there is no prompt, or a prompt is empty.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"prompts: expected at least one, of at least one byte each, got {prompts}")
    device = model.embedding.weight.device
    lens = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
    longest = max(map(len, prompts))
    ids = torch.tensor([list(prompt.ljust(longest, b"\0")) for prompt in prompts], device=device)
    caches = model.new_caches(len(prompts), longest + length)
    scores = model.read(ids, caches, lens, select_every)
    last = scores[torch.arange(len(prompts), device=device), lens - 1]
    # The last row is that of the first new byte, if there is one.
    unused = 1 if length == 0 else 0
    logits = [[scores[row, : len(prompt) - unused]] for row, prompt in enumerate(prompts)]
    texts = [bytearray(prompt) for prompt in prompts]
    step = make_step(model, caches, compiled, select_every)
    for count in range(length):
        chosen = choose(last, temperature, generator)
        for text, byte in zip(texts, chosen.tolist(), strict=True):
            text.append(byte)
        if count < length - 1:
            last = step(chosen[:, None].to(device))
            for row, kept in enumerate(logits):
                kept.append(last[row, None].clone())
    for cache in caches:
        cache.check()
    return Generated([bytes(text) for text in texts], [torch.cat(kept) for kept in logits])


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next byte [B] of each row of logits [B, 256], on the CPU."""
    logits = logits.float().cpu()
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def make_step(model: GPT, caches: list[Cache], compiled: bool, select_every: int) -> Step:
    """Return a function from new bytes [B, 1] to the logits [B, 256] of the bytes that follow."""

    def step(new: Tensor) -> Tensor:
        return model.read(new, caches, select_every=select_every)[:, -1]

    run = torch.compile(step, fullgraph=True) if compiled else step
    return captured(run) if model.embedding.weight.device.type == "cuda" else run


def captured(step: Step) -> Step:
    """Return a function that runs `step` once, captures it as a CUDA graph in the second call, and then replays it."""
    graph = torch.cuda.CUDAGraph()
    buffers: list[Tensor] = []

    def replay(new: Tensor) -> Tensor:
        if not buffers:
            # The first call compiles the kernels, which is not allowed in a capture.
            buffers.append(new.clone())
            return step(new)
        buffers[0].copy_(new)
        if len(buffers) == 1:
            with torch.cuda.graph(graph):
                buffers.append(step(buffers[0]))
        graph.replay()
        return buffers[1]

    return replay
