"""`python -m flexmsa demo`: a small language model learns with MSA on this machine, beside its dense twin."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flexmsa.demo.generate import generate
from flexmsa.demo.progress import Progress, clock
from flexmsa.demo.report import save
from flexmsa.demo.text import Text, read_standard_library
from flexmsa.demo.train import Settings, Training

__all__ = ["main"]

QUICK = {
    "steps": 40,
    "warmup": 15,
    "context": 128,
    "hidden_size": 64,
    "num_layers": 2,
    "head_dim": 16,
    "block_size": 8,
    "probe_every": 5,
    "probe_windows": 2,
    "validation_windows": 8,
    "generated_bytes": 60,
}
# After Ctrl-C the user waits for the prompt.
WINDOWS_AFTER_INTERRUPT = 16
# The text held out should have many such windows.
LONGEST_CONTEXT = 16384
INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit code, 130 after Ctrl-C."""
    try:
        return run(parse(argv))
    except (FileNotFoundError, FileExistsError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.")
        return INTERRUPTED


def parse(argv: list[str]) -> Settings:
    """Read the options; those not given keep the defaults of `Settings`, or of the quick run."""
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa demo",
        description="Train a small byte-level language model with MSA on the Python standard library's source, beside "
        "the same model with dense attention, and compare the two. Takes about four minutes on two CPU cores.",
    )
    parser.add_argument("--quick", action="store_true", help="a much smaller model for a few steps: seconds")
    for name, text in (
        ("steps", "training steps of each model"),
        ("warmup", "how many of them are the dense warm-up, before the selection is switched on"),
        ("batch-size", "windows of text in a batch"),
        ("context", "bytes in a window"),
        ("seed", "of the weights, the batches and the generated text"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {value})")
    parser.add_argument("--temperature", type=float, metavar="T", help="of the generated text; 0 for the likeliest")
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where the results go (default: {default.out}/)")
    options = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = QUICK if options.pop("quick") else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(**{"device": device, **preset, **options})
    problem = find_problem(settings)
    if problem:
        parser.error(problem)
    return settings


def find_problem(settings: Settings) -> str | None:
    """Say what is wrong with the settings, if anything is."""
    for name, least in (("steps", 1), ("warmup", 0), ("batch_size", 1), ("context", 2), ("temperature", 0)):
        value = getattr(settings, name)
        if value < least:
            return f"--{name.replace('_', '-')}: expected at least {least}, got {value}"
    if settings.context > LONGEST_CONTEXT:
        return f"--context: expected at most {LONGEST_CONTEXT}, got {settings.context}"
    if settings.warmup > settings.steps:
        return f"--warmup: expected at most the {settings.steps} steps, got {settings.warmup}"
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        return f"--device: {str(error).splitlines()[0]}"
    return None


def run(settings: Settings) -> int:
    """Train, compare, generate and save, saying so; Ctrl-C goes straight to a brief comparison and the saving."""
    started = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
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
        print(f"\nStopped after {len(training.steps)} of {settings.steps} steps; saving what there is.")
        if "validation" not in results:
            results["validation"] = compare(training, min(WINDOWS_AFTER_INTERRUPT, settings.validation_windows))
    results["seconds"] = {"training": training.seconds, "total": time.monotonic() - started}
    written = save(training, results)
    print(f"Wrote {', '.join(str(path) for path in written)}.")
    conclude(training, results)
    return INTERRUPTED if results["interrupted"] else 0


def introduce(settings: Settings, text: Text, training: Training) -> None:
    """Say what is about to happen."""
    sizes = [sum(p.numel() for p in model.parameters()) for model in (training.msa, training.dense)]
    most, mean = keys_attended(settings)
    print(
        f"Text: {text.num_files} files of Python source from {text.source};\n"
        f"  {len(text.train):,} bytes to learn from, {len(text.validation):,} bytes of other files to test on.\n"
        f"Models: {settings.num_layers} layers of width {settings.hidden_size}, {settings.num_heads} query heads over "
        f"{settings.num_kv_heads} key/value heads;\n"
        f"  MSA {sizes[0]:,} parameters, of which the index branch {sizes[0] - sizes[1]:,}; dense {sizes[1]:,}.\n"
        f"Attention: the last of {settings.context} tokens looks at {most} keys with MSA and {settings.context} without"
        f" (on average {mean:.0f} and {(settings.context + 1) / 2:.0f}).\n"
        f"Training on {settings.device}: {settings.steps} steps of {settings.batch_size} x {settings.context} bytes "
        f"for each model, {settings.warmup} of them the dense warm-up.\n"
        f"  KL: how far the index branch is from the main branch's attention. "
        f"Recall: how much of the {settings.topk} best blocks\n  it finds, by number / by attention mass.",
        flush=True,
    )


def keys_attended(settings: Settings) -> tuple[int, float]:
    """Return the keys that the last token attends to, and the mean over a window."""
    size, topk = settings.block_size, settings.topk
    counts = [min(token, (topk - 1) * size + token % size) + 1 for token in range(settings.context)]
    return counts[-1], sum(counts) / len(counts)


def compare(training: Training, windows: int) -> dict[str, Any]:
    """Measure both models on the text held out."""
    print(f"Testing both on {windows} windows of {training.settings.context} bytes that neither saw.", flush=True)
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
    """Let the MSA model write, and check its cache against the plain forward pass."""
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
    print(f"\nThe MSA model writes on after {settings.prompt!r} (temperature {settings.temperature}):\n")
    print("\n".join("    " + line for line in written.decode(errors="replace").splitlines()))
    print(
        f"\n{settings.generated_bytes} bytes through the cache in {seconds:.1f} s; its logits differ from the uncached "
        f"model's by at most {difference:.1e} (logits reach {plain.abs().max().item():.1f}).",
        flush=True,
    )
    return {
        "text": written.decode(errors="replace"),
        "seconds": seconds,
        "largest_logit_difference": difference,
        "largest_logit": plain.abs().max().item(),
    }


def conclude(training: Training, results: dict[str, Any]) -> None:
    """The last lines: how long it took, and how far apart the models are."""
    found = results["validation"]
    error = "" if found["standard_error"] is None else f" (standard error {found['standard_error']:.3f})"
    side = "above" if found["difference"] > 0 else "below"
    state = "MSA" if training.steps and training.steps[-1].sparse else "MSA, not yet sparse,"
    print(
        f"Took {clock(results['seconds']['total'])}.\n"
        f"Validation loss: {state} {found['msa_loss']:.3f}, dense {found['dense_loss']:.3f} nats a byte; "
        f"MSA is {abs(found['difference']):.3f}{error} {side} dense."
    )
