"""Run transformers' own tests of MiniMax-M3 and Qwen3 as they are, and with flexmsa; list what only flexmsa fails.

    python -m benchmarks.transformers_tests PATH [--models m3 qwen3] [--processes N] [--reuse] [-- pytest's arguments]

PATH is a checkout of transformers, at the version installed, whose tests need `pip install parameterized`. The models
that a test makes without naming an implementation then attend through flexmsa: MiniMax-M3 by
`attn_implementation="flexmsa"`, Qwen3 converted, with the selection on; see `transformers_plugin`. Each outcome is
written to out/transformers-tests as it comes. Ctrl-C prints what is known so far, and `--reuse` runs no model's tests
again that were completed. The summary is benchmarks/results/transformers.json, which `python -m benchmarks.tables`
writes into docs/transformers.md. Exits with 1 if a test fails for a reason that `EXPLAINED` does not name.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_tables import ROOT, load_result, markdown

FILES = {
    "m3": "tests/models/minimax_m3_vl/test_modeling_minimax_m3_vl.py",
    "qwen3": "tests/models/qwen3/test_modeling_qwen3.py",
}
NAMES = {"m3": "MiniMax-M3", "qwen3": "converted Qwen3"}
# Tests that do not ask for flexmsa's attention, by name -> why. They are not run.
SET_ASIDE = {
    "test_sdpa_can_dispatch*": "ask whether a model without a named implementation gets sdpa",
    "test_flash_att*": "of flash-attention's kernels",
    "test_flex_attention*": "of FlexAttention",
    "test_eager_matches_*": "compare transformers' own implementations",
    "test_fsdp2*": "start processes, whose models this plugin does not reach",
    "test_tp_*": "start processes, whose models this plugin does not reach",
}
# A part of a test's name, or of its error -> why it fails.
EXPLAINED = {
    "a mask for each query needs": "a mask for each query is refused",
    "test_can_init_all_missing_weights": "`convert` draws the index weights after all others, so that one seed gives "
    "others than in `from_pretrained`; checkpoints without index weights are refused",
}
FOLDER = ROOT / "out" / "transformers-tests"
RESULT = ROOT / "benchmarks" / "results" / "transformers.json"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reuse", action="store_true", help="do not run tests again whose outcomes are there")
    parser.add_argument("--tests", help="what the tests are of, where it is not one version of transformers")
    parser.epilog = "What follows -- are arguments of pytest, such as -k generate; then no summary is written."
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    found = parser.parse_args(given[:end])
    found.pytest = given[end + 1 :]
    for model in found.models:
        if not (found.path / FILES[model]).exists():
            parser.error(f"PATH: expected a checkout of transformers, got {found.path} without {FILES[model]}")
    return found


def results(model: str, with_flexmsa: bool) -> Path:
    """Where the outcomes of a model's tests are."""
    return FOLDER / f"{model}-{'flexmsa' if with_flexmsa else 'plain'}.jsonl"


def run(model: str, with_flexmsa: bool, options: argparse.Namespace) -> bool:
    """Run a model's tests, unless they are to be reused; return whether their outcomes are complete."""
    path = results(model, with_flexmsa)
    done = path.with_suffix(".done")
    if not (options.reuse and done.exists()):
        path.unlink(missing_ok=True)
        done.unlink(missing_ok=True)
        aside = " or ".join(pattern.strip("*") for pattern in SET_ASIDE)
        command = [sys.executable, "-m", "pytest", FILES[model], "-q", "-W", "ignore", "--tb=no", "--show-capture=no"]
        command += ["-p", "no:cacheprovider", "-p", "benchmarks.transformers_plugin", f"--flexmsa-results={path}"]
        command += ["-k", f"not ({aside})", *options.pytest]
        if options.processes > 1 and importlib.util.find_spec("xdist"):
            command += ["-n", str(options.processes)]
        if with_flexmsa:
            command.append(f"--flexmsa-model={model}")
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": paths}
        print(f"{NAMES[model]}, {'with flexmsa' if with_flexmsa else 'as it is'}", flush=True)
        if subprocess.run(command, cwd=options.path, env={**os.environ, **offline}, check=False).returncode in (0, 1):
            done.touch()
    return done.exists()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the outcome of each test of a file of results; a test fails if a part of it does."""
    rank = {"skipped": 0, "passed": 1, "failed": 2}
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        new = json.loads(line)
        name = new.pop("test")
        old = found.get(name)
        calls = max(new["calls"], old["calls"] if old else 0)
        best = new if old is None or rank[new["outcome"]] > rank[old["outcome"]] else old
        found[name] = {**best, "calls": calls}
    return found


def compare(plain: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of a model's tests, and those that only flexmsa fails."""
    both = [name for name in plain if name in ours and plain[name]["outcome"] != "skipped"]
    passed = [name for name in both if plain[name]["outcome"] == "passed"]
    return {
        "passed": sum(ours[name]["outcome"] == "passed" for name in passed),
        "attended": sum(ours[name]["outcome"] == "passed" and ours[name]["calls"] > 0 for name in passed),
        "failed_with_both": sum(ours[name]["outcome"] == "failed" for name in both if name not in passed),
        "failed": {name: ours[name]["error"] for name in passed if ours[name]["outcome"] == "failed"},
        "skipped": [name for name in passed if ours[name]["outcome"] == "skipped"],
    }


def reason(test: str, error: str) -> str | None:
    """Why a test fails, or None."""
    return next((why for part, why in EXPLAINED.items() if part in test or part in error), None)


def tests_version(path: Path) -> str:
    """The version of transformers whose tests are in a checkout."""
    source = path / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.*)"', source.read_text(), re.MULTILINE) if source.exists() else None
    return found[1] if found else "unknown"


def transformers_tests() -> str:
    """The table of docs/transformers.md."""
    result = load_result("transformers.json")
    head = ["tests of", "pass with both", "of them through flexmsa's attention", "fail with both", "fail with flexmsa"]
    counts = ("passed", "attended", "failed_with_both")
    rows = [
        [NAMES[name], *(str(row[count]) for count in counts), str(len(row["failed"]))]
        for name, row in result["models"].items()
    ]
    failed = [
        [NAMES[name], f"`{test.rpartition('::')[2]}`", reason(test, error) or "unexplained"]
        for name, row in result["models"].items()
        for test, error in row["failed"].items()
    ]
    versions = "transformers {transformers}, tests of {tests}, torch {torch}.\n\n".format(**result["versions"])
    return versions + markdown(head, rows) + "\n\n" + markdown(["tests of", "test that fails", "why"], failed)


def main(arguments: list[str] | None = None) -> int:
    """Run the tests, and print what only flexmsa fails."""
    options = parse(arguments)
    FOLDER.mkdir(parents=True, exist_ok=True)
    complete = True
    try:
        for model in options.models:
            for with_flexmsa in (False, True):
                complete &= run(model, with_flexmsa, options)
    except KeyboardInterrupt:
        complete = False
    models = {model: compare(*(read(results(model, x)) for x in (False, True))) for model in options.models}
    unexplained = 0
    for model, found in models.items():
        print(f"\n{NAMES[model]}: {found['passed']} pass with both, {found['attended']} of them through flexmsa")
        print(f"{found['failed_with_both']} fail with both, {len(found['failed'])} only with flexmsa")
        for name, error in found["failed"].items():
            why = reason(name, error)
            unexplained += why is None
            print(f"  {name}: {why or 'UNEXPLAINED'}\n    {error}")
        for name in found["skipped"]:
            print(f"  skipped only with flexmsa: {name}")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    if complete and not options.pytest:
        before = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
        summary = {
            "versions": {**versions, "tests": options.tests or tests_version(options.path)},
            "models": {**before, **models},
        }
        RESULT.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if unexplained or not complete else 0


if __name__ == "__main__":
    raise SystemExit(main())
