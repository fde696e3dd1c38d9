"""What commands share: the options of demos, problems with options, files and folders, exit codes, and Ctrl-C."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

INTERRUPTED = 130
USAGE_ERROR = 2


def exit_code(run: Callable[[], int]) -> int:
    """Run a demo; returns its exit code, 130 after Ctrl-C."""
    try:
        return run()
    except (FileNotFoundError, FileExistsError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.")
        return INTERRUPTED


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, then rename it, so that `path` is never half-written."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_options(
    parser: argparse.ArgumentParser,
    argv: list[str],
    default: Any,
    quick: dict[str, Any],
    ints: dict[str, str],
    floats: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Add the options that all demos have, and `ints` and `floats` (option -> help), to the parser, and read them.

    Returns:
        The settings that differ from `default`: the device, `quick` for a quick run, and the options given.
    """
    parser.add_argument("--quick", action="store_true", help="a much smaller model and a few steps: takes seconds")
    for name, text in ints.items():
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {value})")
    for name, text in (floats or {}).items():
        parser.add_argument(f"--{name}", type=float, metavar=name[0].upper(), help=text)
    parser.add_argument("--device", help="such as cpu or cuda (default: cuda if available)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"folder of the results (default: {default.out}/)")
    options = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    preset = quick if options.pop("quick") else {}
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", **preset, **options}


def find_problem(settings: Any, least: dict[str, int]) -> str | None:
    """Return a message if a setting is below its least value, or if there is no such device."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value < bound:
            return f"--{name.replace('_', '-')}: expected at least {bound}, got {value}"
    return find_device_problem(settings.device)


def find_device_problem(device: str) -> str | None:
    """Return a message if torch has no such device here, or if it holds no numbers, as "meta"."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        return f"--device: expected a device of this machine, got {device}: {str(error).splitlines()[0]}"
    return None


def prepare_folder(folder: Path, names: Sequence[str]) -> None:
    """Make the folder of a run's results, and say if the results of an earlier run are in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if old := [name for name in names if (folder / name).exists()]:
        print(f"{folder} has the results of an earlier run, which this run overwrites: {', '.join(old)}.", flush=True)
