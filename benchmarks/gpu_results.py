"""The result file of `benchmarks/gpu.py`, organised by parts, so that a long benchmark can run part by part."""

import json
from pathlib import Path

from flexmsa._command import write_whole


class Results:
    """Rows that name their part, and per part the run that measured it: the machine and its ceilings.

    The file is written after every row, so an interrupted run keeps its measurements.
    """

    def __init__(self, path: Path, **constants: object) -> None:
        """Load the file if it exists; `constants` are written in addition to the rows."""
        found = json.loads(path.read_text()) if path.exists() else {"parts": {}, "rows": []}
        if "parts" not in found:
            raise SystemExit(f"{path}: expected rows that name their part; move this older file away")
        self.path, self.constants = path, constants
        self.parts: dict[str, dict] = found["parts"]
        self.rows: list[dict] = found["rows"]

    def begin(self, part: str, run: dict) -> None:
        """Drop the part's old rows; the file keeps them until the first new one."""
        self.parts[part] = run
        self.rows = [row for row in self.rows if row["part"] != part]

    def add(self, part: str, row: dict) -> None:
        self.rows.append({"part": part, **row})
        # The file may contain hours of earlier runs.
        text = json.dumps({"parts": self.parts, **self.constants, "rows": self.rows}, indent=1)
        write_whole(self.path, lambda unfinished: unfinished.write_text(text))
