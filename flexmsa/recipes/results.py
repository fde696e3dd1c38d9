"""The folder of a run: checkpoints step-N, and the log metrics.jsonl, a line of JSON for each step that is logged."""

import contextlib
import json
from pathlib import Path
from typing import Any

from flexmsa._command import write_whole

__all__ = ["add_entry", "cut_log", "newest_checkpoint", "step_of"]

LOG = "metrics.jsonl"


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint of the last step."""
    return max((folder for folder in out.glob("step-*") if is_complete(folder)), default=None)


def is_complete(folder: Path) -> bool:
    """Whether all processes have written their parts of a checkpoint: this file is written last."""
    return (folder / ".metadata").exists()


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(folder.name.removeprefix("step-"))


def add_entry(out: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the log."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOG).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def cut_log(out: Path, step: int) -> None:
    """Remove the entries of steps after `step`, which are made again, and a line that a killed process has begun.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> _ = (out / LOG).write_text('{"step": 1}\\n{"step": 2}\\n{"st')
    >>> cut_log(out, step=1)
    >>> (out / LOG).read_text()
    '{"step": 1}\\n'
    """
    if not (out / LOG).exists():
        return
    kept = ""
    for line in (out / LOG).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            kept += f"{line}\n" if json.loads(line)["step"] <= step else ""
    write_whole(out / LOG, lambda path: path.write_text(kept))
