"""The commands of the study: plan, prepare, short, train, speed, report."""

import argparse
import json
import lzma
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.arms import find_arm
from benchmarks.quality.checks import check
from benchmarks.quality.measures import layer_recalls, measure
from benchmarks.quality.plan import parameters, plan_table, plan_text
from benchmarks.quality.report import summary, write_report
from benchmarks.quality.settings import FULL, QUICK, Settings
from benchmarks.quality.side_by_side import run_each
from benchmarks.quality.speed import speeds
from benchmarks.quality.tokens import prepare
from benchmarks.quality.train import Training
from flexmsa._command import write_whole

# Of a run that has not come to its end, but can go on.
UNFINISHED = 3


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code."""
    options = parse(argv)
    settings = QUICK if options.quick else FULL
    if options.steps:
        settings = settings.shortened(options.steps)
    if options.long_steps:
        settings = settings.lengthened(options.long_steps)
    if options.command == "plan":
        print(f"{plan_text(settings)}\n\n{plan_table(settings)}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "report":
        print(write_report(options.out))
        return 0
    commands = {"prepare": run_prepare, "short": run_train, "train": run_train, "speed": run_speed}
    return commands[options.command](settings, options)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument(
        "command",
        choices=("plan", "prepare", "short", "train", "speed", "report"),
        help="short: train the phase that all arms of a seed share, so that not each of them has to",
    )
    parser.add_argument(
        "--arm",
        nargs="+",
        default=["msa"],
        help="of train: the table of plan has the names; several are trained side by side, one on each GPU",
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the weights and the order of the text")
    parser.add_argument("--seconds", type=float, default=540.0, help="of train: most time of all; a later call goes on")
    parser.add_argument("--steps", type=int, help="of train: so many steps, all phases shorter in proportion")
    parser.add_argument(
        "--long-steps",
        type=int,
        help="so many steps on long rows, and all else alike: a study of its own, for its own --out",
    )
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="folder of the results, which are small")
    parser.add_argument("--work", type=Path, default=Path("out/quality-work"), help="folder of the text and of weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="everything tiny, for a CPU")
    return parser.parse_args(argv)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on beside the settings."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def write(path: Path, found: dict[str, Any]) -> None:
    """Write JSON, its numbers with six digits; all of it or nothing."""
    short = json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(short) + "\n"))
    print(f"wrote {path}", flush=True)


def run_prepare(settings: Settings, options: argparse.Namespace) -> int:
    corpus = prepare(settings, options.work)
    facts = corpus.facts
    print(
        f"text {facts['digest']}: {len(facts['packages'])} packages, {len(corpus.train)} rows to train and "
        f"{len(corpus.heldout)} held out; seconds {facts['seconds']}"
    )
    write(options.out / "text.json", facts)
    files = options.work / f"text-{settings.text_key()}" / "files.json"
    (options.out / "files.json.xz").write_bytes(lzma.compress(files.read_bytes()))
    return 0


def run_train(settings: Settings, options: argparse.Namespace) -> int:
    """Train an arm as far as the time allows, and measure it at its end; or several in processes of their own.

    With the command short, train the phase that all arms share.
    """
    started, device = time.monotonic(), torch.device(options.device)
    arms = [find_arm(settings, name) for name in options.arm]
    corpus = prepare(settings, options.work)
    if len(options.arm) * len(options.seed) > 1:
        given = shared_options(options), options.out, torch.cuda.device_count()
        return run_each(options.command, options.arm, options.seed, *given)
    (arm,), (seed,) = arms, options.seed
    only_short = options.command == "short"
    if only_short:
        arm = replace(arm, name="short", phases=arm.phases[:1])
    times = {"text": time.monotonic() - started}
    training = Training(settings, arm, seed, corpus, device)
    name = f"{arm.name}-{seed}"
    # The file of the run, and the one of the phase that all arms share.
    saved, shared = (options.work / f"{each}-{settings.key()}.pt" for each in (name, f"short-{seed}"))
    if device.type == "cuda":
        training.compile()
    checks = check(training)
    found_file = next((path for path in (saved, shared) if path.exists()), None)
    if found_file is not None:
        training.load(found_file)
        print(f"{name}: continuing after step {training.done}", flush=True)
    times["until_training"] = time.monotonic() - started
    print(f"{name}: checked; {times['until_training']:.0f} s until training", flush=True)
    train(training, options.seconds - (time.monotonic() - started), shared)
    times["until_trained"] = time.monotonic() - started
    finished = training.done == arm.steps
    # Kept through an error of the measurements too.
    training.save(saved)
    if only_short:
        print(f"{saved}: {training.done} of {arm.steps} steps", flush=True)
        return 0 if finished else UNFINISHED
    found: dict[str, Any] = {"arm": arm.name, "title": arm.title, "seed": seed, "finished": False}
    found |= {"settings": asdict(settings), "key": settings.key(), "text": corpus.facts["digest"], "checks": checks}
    found |= {"batches": training.batches, "parameters": asdict(parameters(settings)), "machine": machine(device)}
    found |= {"memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else None, "log": training.log}
    write(options.out / f"{name}.json", {**found, "times": times})
    if finished:
        found |= {"finished": True, **measure(training)}
        times["all"] = time.monotonic() - started
        write(options.out / f"{name}.json", {**found, "times": times})
        print(summary(found), flush=True)
    print(f"{name}: {training.done} of {arm.steps} steps; seconds {times}", flush=True)
    return 0 if finished else UNFINISHED


def shared_options(options: argparse.Namespace) -> list[str]:
    """The options that a process of each arm is given too."""
    names = ("seconds", "steps", "long_steps", "out", "work", "device")
    given = [
        f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names if getattr(options, name) is not None
    ]
    return [*given, *(["--quick"] if options.quick else [])]


def train(training: Training, seconds: float, shared: Path) -> None:
    """Train with messages, save the end of the phase that all arms share, and log the recalls of some steps."""
    settings = training.settings
    for done in training.train(seconds):
        entry = training.log[-1]
        if done == settings.short_steps:
            training.save(shared)
        if done % settings.measure_every == 0 or done == settings.log_every:
            training.model.eval()
            with torch.compiler.set_stance("force_eager"):
                entry["recalls"] = layer_recalls(training, 1)
            score = sum(layer[1] for layer in entry["recalls"]["index"]) / settings.num_layers
            speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
            print(f"step {done} {entry['way']} loss {entry['loss']:.3f} score recall {score:.2f} {speed}", flush=True)


def run_speed(settings: Settings, options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    corpus = prepare(settings, options.work)
    rows = []
    for row in speeds(settings, corpus, device):
        rows.append(row)
        print(row, flush=True)
        write(options.out / "speed.json", {"machine": machine(device), "key": settings.key(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
