"""The file that `benchmarks/gpu.py` writes, kept by part, so that a long benchmark can be run in pieces."""

import json
from pathlib import Path


class Results:
    """Rows, each of a part, and for each part the run that measured it: the machine and its ceilings.

    The file is written after every row, so that a run that is interrupted keeps what it has measured.
    """

    def __init__(self, path: Path, **constants: object) -> None:
        """Take what the file has, if there is one; `constants` are written beside the rows."""
        found = json.loads(path.read_text()) if path.exists() else {"parts": {}, "rows": []}
        if "parts" not in found:
            raise SystemExit(f"{path}: expected rows that name their part; move this older file away")
        self.path, self.constants = path, constants
        self.parts: dict[str, dict] = found["parts"]
        self.rows: list[dict] = found["rows"]

    def begin(self, part: str, run: dict) -> None:
        """Drop the part's rows for those that are to come; the file keeps them until the first of these."""
        self.parts[part] = run
        self.rows = [row for row in self.rows if row["part"] != part]

    def add(self, part: str, row: dict) -> None:
        self.rows.append({"part": part, **row})
        # In one move, since the file may hold hours of earlier runs.
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({"parts": self.parts, **self.constants, "rows": self.rows}, indent=1))
        draft.replace(self.path)
