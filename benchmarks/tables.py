"""Write the committed results into the documents: `python -m benchmarks.tables`.

Between `<!-- NAME -->` and `<!-- end NAME -->` in docs/performance.md and README.md stands what `TABLES` makes of
benchmarks/results/*.json, so that no figure is typed by hand. A test checks that they agree.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/performance.md", "docs/serving.md")


def _load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cpu_machine() -> str:
    machine = _load("cpu.json")["machine"]
    return f"{machine['cpu']}, {machine['threads']} cores, torch {machine['torch']}, float32."


def cpu_table() -> str:
    rows = [
        [
            f"{row['seqlen'] // 1024}K",
            row["heads"],
            row["variant"],
            f"{row['seconds']:.2f} s",
            f"{row['dense_seconds']:.2f} s",
            f"{row['ratio']:.1f}x",
            f"{row['limit']:.1f}x",
            f"{row['share']:.2f}",
            str(row["bar"]),
        ]
        for row in _load("cpu.json")["rows"]
    ]
    head = ["tokens", "heads", "", "ours", "dense", "faster", "FLOP limit", "share of it", "aim"]
    return _markdown(head, rows)


def cpu_memory() -> str:
    memory = _load("cpu.json")["memory_mib"]
    lengths = list(next(iter(memory.values())))
    rows = [[name, *(f"{by_length[n]:.0f} MiB" for n in lengths)] for name, by_length in memory.items()]
    return _markdown(["", *(f"{int(n) // 1024}K" for n in lengths)], rows)


def gpu_machine() -> str:
    found = _load("gpu-h200.json")
    return f"{found['gpu']}, driver {found['driver']}, torch {found['torch']}, triton {found['triton']}."


def _gpu_rows() -> dict[str, dict]:
    return {row["name"]: row for row in _load("gpu-h200.json")["rows"]}


def gpu_selection() -> str:
    rows = [
        [
            name.removeprefix("selection "),
            f"{row['ms']:.3f} ms",
            f"{row['floor_ms']:.3f} ms",
            f"{row['floor_ms'] / row['ms']:.2f}",
        ]
        for name, row in _gpu_rows().items()
        if name.startswith("selection ")
    ]
    return _markdown(["queries x keys", "selection", "FLOP floor", "share of it"], rows)


def gpu_decode() -> str:
    found = _gpu_rows()
    shapes = [name.removeprefix("decode ").split(":")[0] for name in found if name.endswith(": decode")]
    rows = []
    for shape in shapes:
        ours, dense = found[f"decode {shape}: decode"], found[f"decode {shape}: cudnn"]["ms"]
        times = [f"{1e3 * ms:.0f} us" for ms in (ours["ms"], ours["floor_ms"], dense)]
        rows.append([shape, *times, f"{dense / ours['ms']:.1f}x"])
    return _markdown(["batch x keys", "decode step", "byte floor", "dense cuDNN", "faster"], rows)


def gpu_training() -> str:
    rows = [
        [
            row["pattern"],
            row["step"],
            f"{row['ms']:.1f} ms",
            f"{row['products_ms']:.1f} ms",
            "" if row["bytes_ms"] is None else f"{row['bytes_ms']:.1f} ms",
        ]
        for row in _load("gpu-h200-training.json")["rows"]
    ]
    return _markdown(["selection", "step", "time", "products alone", "bytes alone, KV-outer"], rows)


def gpu_flex() -> str:
    """FlexAttention's main branch beside dense cuDNN, forward and with its backward."""
    rows = []
    for name, row in _gpu_rows().items():
        if name.startswith("main branch ") and name.endswith("+ backward"):
            forward = _gpu_rows()[name.replace("+ backward", "forward")]
            seqlen, what = name.removeprefix("main branch ").removesuffix(", + backward").split(": ")
            rows.append([f"{int(seqlen) // 1024}K", what, f"{forward['ms']:.1f} ms", f"{row['ms']:.1f} ms"])
    return _markdown(["tokens", "", "forward", "forward + backward"], rows)


def kernels_sm_90() -> str:
    found = _load("kernels.json")
    rows = []
    for row in found["rows"]:
        if row["target"] == "sm_90":
            flops = found["flops_per_byte"][row["kernel"]]
            numbers = [str(row["registers"]), f"{row['shared'] / 1024:.1f} KiB", str(row["spills"])]
            bound = "products" if flops > found["ridge"] else "memory"
            per_byte = f"{flops:.0f}" if flops > 10 else f"{flops:.2f}"
            rows.append([row["kernel"], *numbers, "yes" if row["wgmma"] else "no", per_byte, bound])
    head = ["kernel", "registers", "shared memory", "spilled bytes", "wgmma", "FLOPs per byte", "bound"]
    return _markdown(head, rows)


def kernels_targets() -> str:
    found = _load("kernels.json")["rows"]
    cells = {
        (row["kernel"], row["target"]): f"{row['registers']} / {row['shared'] / 1024:.1f} / {row['spills']}"
        for row in found
    }
    targets = list(dict.fromkeys(row["target"] for row in found))
    names = dict.fromkeys(row["kernel"] for row in found)
    return _markdown(["kernel", *targets], [[name, *(cells[name, target] for target in targets)] for name in names])


def fp8_selection() -> str:
    rows = [
        [f"{row['seqlen'] // 1024}K", f"{row['ids_that_differ']:.1%}", f"{row['score_recall']:.2%}"]
        for row in _load("fp8.json")["rows"]
    ]
    return _markdown(["keys", "ids that differ", "score recall"], rows)


def summary() -> str:
    cpu = {(row["seqlen"], row["variant"]): row for row in _load("cpu.json")["rows"]}
    found = _gpu_rows()
    lines = []
    for (seqlen, variant), row in cpu.items():
        if variant.startswith("layer"):
            lines.append(
                f"- CPU ({_load('cpu.json')['machine']['threads']} cores), {seqlen // 1024}K tokens, {variant}: "
                f"**{row['ratio']:.1f} times faster** than dense attention; the FLOPs allow {row['limit']:.1f}."
            )
    selection = found["selection 131072 x 131072"]
    lines.append(
        f"- H200, selection for 128K queries, 64/4 heads: {selection['ms']:.1f} ms; its products alone take "
        f"{selection['floor_ms']:.1f} ms."
    )
    training: dict[str, list[float]] = {}
    for row in _load("gpu-h200-training.json")["rows"]:
        training.setdefault(row["step"], []).append(row["ms"])
    spans = ", ".join(f"{step} {min(ms):.0f} to {max(ms):.0f} ms" for step, ms in training.items())
    lines.append(f"- H200, training at 128K tokens, 64/4 heads, by how much neighbouring tokens choose alike: {spans}.")
    ours, dense = found["decode 1 x 1048576: decode"]["ms"], found["decode 1 x 1048576: cudnn"]["ms"]
    faster = f"{dense / ours:.1f} times faster than dense cuDNN"
    lines.append(f"- H200, one decoding step at 1M tokens: {1e3 * ours:.0f} us, {faster}.")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "cpu machine": cpu_machine,
    "cpu table": cpu_table,
    "cpu memory": cpu_memory,
    "gpu machine": gpu_machine,
    "gpu selection": gpu_selection,
    "gpu decode": gpu_decode,
    "gpu training": gpu_training,
    "gpu flex": gpu_flex,
    "fp8 selection": fp8_selection,
    "kernels sm_90": kernels_sm_90,
    "kernels targets": kernels_targets,
    "summary": summary,
}


def fill(text: str) -> str:
    """Return a page with its tables made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        text = re.sub(pattern, lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text()))
        print(f"filled {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
