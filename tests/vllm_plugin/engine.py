"""vLLM's engine in this process."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm_plugin.checkpoints import TOKENS, prompts

from benchmarks.vllm_engine import running

# Prompts are longer than a step takes, so that chunks of some are in steps with tokens of others.
DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
    "dtype": "float32",
    "disable_log_stats": False,
}


@contextlib.contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    """An engine with settings other than the defaults above."""
    # An engine looks through the names of all modules, and fails at those of llvmlite, which one with drafts imports.
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "llvmlite"}
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(running(folder, **{**DEFAULTS, **settings}))
        finally:
            sys.modules.update(hidden)
        yield llm


def generate(llm: LLM, given: list[list[int]] | None = None) -> list[list[int]]:
    """Return the greedy tokens that follow each prompt."""
    how = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": ids} for ids in given or prompts()], how, use_tqdm=False)
    return [list(request.outputs[0].token_ids) for request in found]


def count(llm: LLM, name: str) -> float:
    """Return one of vLLM's counters."""
    (value,) = (metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")
    return value
