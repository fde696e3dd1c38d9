"""`python -m flexmsa convert-demo`: train a dense transformers model, convert it, and compare the results."""

import argparse
import dataclasses
import time
from typing import Any

import torch
import transformers

from flexmsa._command import INTERRUPTED, exit_code, find_problem, prepare_folder, read_options
from flexmsa._progress import Progress, clock
from flexmsa.demo.text import Text, read_standard_library
from flexmsa.integrations.transformers.demo.report import FILES, draw_table, save
from flexmsa.integrations.transformers.demo.retrieval import KEY_LENGTH
from flexmsa.integrations.transformers.demo.train import WAYS, Demo, Settings, unigram_loss

__all__ = ["main"]

QUICK = {
    **{"hidden_size": 48, "num_layers": 2, "head_dim": 16, "block_size": 4, "topk": 6, "context": 96},
    **{"dense_steps": 150, "warm_up_steps": 30, "sparse_steps": 10, "measure_every": 5, "test_windows": 32},
}
# The largest loss of the converted model, relative to the dense one, that is expected.
MOST_ABOVE_DENSE = 0.02


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code, 130 after Ctrl-C."""
    return exit_code(lambda: run(parse(argv)))


def parse(argv: list[str]) -> Settings:
    """Read the options; all others keep the defaults of `Settings`, or of the quick run."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa convert-demo",
        description="Train a small dense Qwen3 of transformers on the source code of the Python standard library, "
        "convert it to MiniMax Sparse Attention, and compare it with other selections of the same number of keys. "
        "Takes about ten minutes on two CPU cores.",
    )
    ints = {
        "dense-steps": "training steps of the dense model",
        "warm-up-steps": "steps of phase 1, which trains the index branch alone",
        "sparse-steps": "steps of phase 2, and of training with each other selection",
        "batch-size": "windows of text per batch",
        "seed": "random seed of the weights and the batches",
    }
    settings = Settings(**read_options(parser, argv, Settings(), QUICK, ints))
    problem = find_problem(settings, dict.fromkeys(("dense_steps", "warm_up_steps", "sparse_steps", "batch_size"), 1))
    if problem:
        parser.error(problem)
    return settings


def run(settings: Settings) -> int:
    """Train, convert, compare and save, with messages; after Ctrl-C, only saving follows."""
    started = time.monotonic()
    prepare_folder(settings.out, FILES)
    text = read_standard_library()
    demo = Demo(settings, text)
    results: dict[str, Any] = {"settings": {**dataclasses.asdict(settings), "out": str(settings.out)}}
    results |= {"torch": torch.__version__, "transformers": transformers.__version__}
    results |= {"threads": torch.get_num_threads(), "unigram_loss": unigram_loss(text), "interrupted": False}
    introduce(settings, text, demo)
    try:
        train(demo, settings, results["unigram_loss"])
    except KeyboardInterrupt:
        results["interrupted"] = True
        print("\nStopped; saving the results so far.")
    results["seconds"] = time.monotonic() - started
    for name, scores in (("not_retrained", demo.swapped), ("retrained", demo.trained)):
        results[name] = {way: {"loss": score.loss, "answers": score.answers} for way, score in scores.items()}
    written = save(demo, results)
    print(f"\n{draw_table(demo, results['unigram_loss'])}")
    print(f"Wrote {', '.join(str(path) for path in written)}. Took {clock(results['seconds'])}.")
    conclude(demo)
    return INTERRUPTED if results["interrupted"] else 0


def introduce(settings: Settings, text: Text, demo: Demo) -> None:
    """Print the text, the model and the budget of the run."""
    size = sum(parameter.numel() for parameter in demo.dense.parameters())
    keys = settings.block_size * settings.topk
    print(
        f"Text: {text.num_files} files of Python source from {text.source};\n"
        f"  {len(text.train):,} bytes for training, {len(text.validation):,} bytes of other files for validation.\n"
        f"Model: {type(demo.dense).__name__}, {settings.num_layers} layers of width {settings.hidden_size}, "
        f"{size:,} parameters, on {settings.device}.\n"
        f"Budget: {keys} of {settings.context} keys, {settings.topk} blocks of {settings.block_size}.\n"
        f"Retrieval: the end of the context asks for a key of {KEY_LENGTH} letters in the first half of the context.\n"
        f"  KL: divergence of the index branches from the main branch's attention, summed over the layers.\n"
        f"  Score recall: share of the attention mass on the {settings.topk} best blocks that they find.",
        flush=True,
    )


def train(demo: Demo, settings: Settings, unigram: float) -> None:
    """Train the dense model, convert it, and train each way to attend."""
    print(f"\nDense training, {settings.dense_steps} steps.", flush=True)
    demo.train_dense(Progress(settings.dense_steps))
    print(
        f"\nConverted. Phase 1, {settings.warm_up_steps} steps: trains the index branches, all else is frozen.",
        flush=True,
    )
    demo.warm_up(Progress(settings.warm_up_steps))
    demo.try_ways()
    dense = demo.swapped["dense"]
    print(
        f"The dense model: {dense.loss:.3f} nats per byte (unigram baseline {unigram:.3f}), "
        f"retrieval {dense.answers:.0%}."
    )
    for way in WAYS:
        print(f"\nFurther training, {settings.sparse_steps} steps: {way}.", flush=True)
        demo.train_way(way, Progress(settings.sparse_steps))


def conclude(demo: Demo) -> None:
    """Print whether the conversion reached the expected results."""
    if not {"dense", "MSA", "window"} <= demo.trained.keys():
        return
    dense, msa, window = (demo.trained[way] for way in ("dense", "MSA", "window"))
    above = msa.loss / dense.loss - 1
    error = (msa.losses - dense.losses).std().item() / len(msa.losses) ** 0.5 / dense.loss
    near = "within" if above <= MOST_ABOVE_DENSE else "not within"
    ahead = "ahead of" if msa.answers > window.answers else "not ahead of"
    print(
        f"MSA is {above:+.1%} from dense (standard error {error:.1%}), {near} the {MOST_ABOVE_DENSE:.0%} expected,\n"
        f"and {ahead} the window on retrieval ({msa.answers:.0%} and {window.answers:.0%})."
    )
