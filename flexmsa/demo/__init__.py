"""`python -m flexmsa demo`: train a small language model with MSA, and its dense twin for comparison."""

import argparse
import dataclasses
import time
from typing import Any

import torch

from flexmsa._command import INTERRUPTED, exit_code, find_problem, prepare_folder, read_options
from flexmsa._progress import Progress, clock
from flexmsa.demo.generate import generate
from flexmsa.demo.report import FILES, save
from flexmsa.demo.text import Text, read_standard_library
from flexmsa.demo.train import Settings, Training

__all__ = ["main"]

QUICK = {
    **{"hidden_size": 64, "num_layers": 2, "head_dim": 16, "block_size": 8, "context": 128, "steps": 40, "warmup": 15},
    **{"probe_every": 5, "probe_windows": 2, "validation_windows": 8, "generated_bytes": 60},
}
# Few windows, as the user waits for the prompt after Ctrl-C.
WINDOWS_AFTER_INTERRUPT = 16
# The held-out text should have many windows of this length.
LONGEST_CONTEXT = 16384


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code, 130 after Ctrl-C."""
    return exit_code(lambda: run(parse(argv)))


def parse(argv: list[str]) -> Settings:
    """Read the options; all others keep the defaults of `Settings`, or of the quick run."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa demo",
        description="Train a small byte-level language model with MSA on the source code of the Python standard "
        "library, and the same model with dense attention, and compare the two. Takes about four minutes on two CPU "
        "cores.",
    )
    ints = {
        "steps": "training steps of each model",
        "warmup": "steps of the dense warm-up at their beginning, without selection",
        "batch-size": "windows of text per batch",
        "context": "bytes per window",
        "seed": "random seed of the weights, the batches and the generated text",
    }
    floats = {"temperature": "temperature of the generated text; 0 takes the most likely byte"}
    settings = Settings(**read_options(parser, argv, Settings(), QUICK, ints, floats))
    least = {"steps": 1, "warmup": 0, "batch_size": 1, "context": 2, "temperature": 0}
    problem = find_problem(settings, least)
    if problem is None and settings.context > LONGEST_CONTEXT:
        problem = f"--context: expected at most {LONGEST_CONTEXT}, got {settings.context}"
    if problem is None and settings.warmup > settings.steps:
        problem = f"--warmup: expected at most the {settings.steps} steps, got {settings.warmup}"
    if problem:
        parser.error(problem)
    return settings


def run(settings: Settings) -> int:
    """Train, compare, generate and save, with messages; after Ctrl-C, only a brief comparison and saving follow."""
    started = time.monotonic()
    prepare_folder(settings.out, FILES)
    text = read_standard_library()
    training = Training(settings, text)
    introduce(settings, text, training)
    results: dict[str, Any] = {"settings": {**dataclasses.asdict(settings), "out": str(settings.out)}}
    results["torch"], results["threads"] = torch.__version__, torch.get_num_threads()
    results["interrupted"] = False
    try:
        training.run(Progress(settings.steps))
        results["validation"] = compare(training, settings.validation_windows)
        results["generation"] = write_text(training)
    except KeyboardInterrupt:
        results["interrupted"] = True
        print(f"\nStopped after {len(training.steps)} of {settings.steps} steps; saving the results so far.")
        if "validation" not in results:
            results["validation"] = compare(training, min(WINDOWS_AFTER_INTERRUPT, settings.validation_windows))
    results["seconds"] = {"training": training.seconds, "total": time.monotonic() - started}
    written = save(training, results)
    print(f"Wrote {', '.join(str(path) for path in written)}.")
    conclude(training, results)
    return INTERRUPTED if results["interrupted"] else 0


def introduce(settings: Settings, text: Text, training: Training) -> None:
    """Print the text, the models and the budget of the run."""
    sizes = [sum(p.numel() for p in model.parameters()) for model in (training.msa, training.dense)]
    most, mean = keys_attended(settings)
    print(
        f"Text: {text.num_files} files of Python source from {text.source};\n"
        f"  {len(text.train):,} bytes for training, {len(text.validation):,} bytes of other files for validation.\n"
        f"Models: {settings.num_layers} layers of width {settings.hidden_size}, {settings.num_heads} query heads over "
        f"{settings.num_kv_heads} key/value heads;\n"
        f"  MSA {sizes[0]:,} parameters, {sizes[0] - sizes[1]:,} of them in the index branch; dense {sizes[1]:,}.\n"
        f"Attention: the last of {settings.context} tokens attends to {most} keys with MSA and {settings.context} "
        f"without (on average {mean:.0f} and {(settings.context + 1) / 2:.0f}).\n"
        f"Training on {settings.device}: {settings.steps} steps of {settings.batch_size} x {settings.context} bytes "
        f"for each model, {settings.warmup} of them the dense warm-up.\n"
        f"  KL: divergence of the index branch from the main branch's attention. "
        f"Recall: share of the {settings.topk} best blocks\n  that it finds, by number / by attention mass.",
        flush=True,
    )


def keys_attended(settings: Settings) -> tuple[int, float]:
    """Return the number of keys that the last token attends to, and the mean over a window."""
    size, topk = settings.block_size, settings.topk
    counts = [min(token, (topk - 1) * size + token % size) + 1 for token in range(settings.context)]
    return counts[-1], sum(counts) / len(counts)


def compare(training: Training, windows: int) -> dict[str, Any]:
    """Measure both models on held-out text."""
    print(f"Validating both on {windows} held-out windows of {training.settings.context} bytes.", flush=True)
    msa, dense = (training.validate(model, windows) for model in (training.msa, training.dense))
    gap = msa - dense
    return {
        "windows": windows,
        "msa_loss": msa.mean().item(),
        "dense_loss": dense.mean().item(),
        "difference": gap.mean().item(),
        "standard_error": gap.std().item() / windows**0.5 if windows > 1 else None,
    }


def write_text(training: Training) -> dict[str, Any]:
    """Generate text with the MSA model, and compare its cached logits with the uncached forward pass."""
    settings = training.settings
    training.msa.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    started = time.monotonic()
    prompts = [settings.prompt.encode()]
    result = generate(training.msa, prompts, settings.generated_bytes, settings.temperature, generator)
    seconds = time.monotonic() - started
    written, cached = result.texts[0], result.logits[0]
    with torch.no_grad():
        plain = training.msa(torch.tensor([list(written[:-1])], device=cached.device))[0][0]
    difference = (cached - plain).abs().max().item()
    print(f"\nThe MSA model continues {settings.prompt!r} (temperature {settings.temperature}):\n")
    print("\n".join("    " + line for line in written.decode(errors="replace").splitlines()))
    print(
        f"\n{settings.generated_bytes} bytes through the cache in {seconds:.1f} s; the logits differ from the uncached "
        f"ones by at most {difference:.1e} (largest logit {plain.abs().max().item():.1f}).",
        flush=True,
    )
    return {
        "text": written.decode(errors="replace"),
        "seconds": seconds,
        "largest_logit_difference": difference,
        "largest_logit": plain.abs().max().item(),
    }


def conclude(training: Training, results: dict[str, Any]) -> None:
    """Print the last lines: the time, and the losses of both models."""
    found = results["validation"]
    error = "" if found["standard_error"] is None else f" (standard error {found['standard_error']:.3f})"
    side = "above" if found["difference"] > 0 else "below"
    state = "MSA" if training.steps and training.steps[-1].sparse else "MSA, not yet sparse,"
    print(
        f"Took {clock(results['seconds']['total'])}.\n"
        f"Validation loss: {state} {found['msa_loss']:.3f}, dense {found['dense_loss']:.3f} nats per byte; "
        f"MSA is {abs(found['difference']):.3f}{error} {side} dense."
    )
