"""Tables of docs/notes/selection-8-bits.md, for `benchmarks/tables.py`."""

from benchmarks.gpu_tables import load_result, markdown


def selection_8_bits() -> str:
    by_keys: dict[tuple[str, int], dict[str, dict]] = {}
    for row in load_result("selection_8_bits.json")["rows"]:
        by_keys.setdefault((row["keys"], row["seqlen"]), {})[row["scale per"]] = row
    rows = []
    for (keys, seqlen), found in by_keys.items():
        token, block, plain = (found[name] for name in ("token", "block", "token, not rotated"))
        counts = [f"{row['again']['mean']:.0f}" for row in (token, plain)]
        most = "{mean:.0f} / {99 %:.0f} / {most:.0f}".format(**block["again"])
        shares = ("certified by 32", "certified by 64", "marked with room for 64", "ids that differ in int8 alone")
        bounds = f"{block['candidates']['mean']:.0f}"
        names = f"{keys}, {seqlen // 1024}K", bounds, most
        rows.append([*names, *counts, *(f"{block[name]:.1%}" for name in shares)])
    head = ["keys", "by bounds alone", "again: mean / 99 % / most", "per token", "not rotated"]
    return markdown([*head, "certified, 32 best", "64 best", "marked", "ids that differ in int8 alone"], rows)


def certified_lengths() -> str:
    found = load_result("certified-h200.json")["lengths"]
    steps = list(found[0]["kernels"])
    rows = []
    for row in found:
        times = [
            f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" for ms in (row["ms"], row["bf16_ms"], *row["kernels"].values())
        ]
        rows.append(
            [f"{row['groups']} x {row['tokens'] // 1024}K", *times, str(row["marked"]), f"{row['peak_mib']} MiB"]
        )
    return markdown(["groups x tokens", "all, ms", "bf16 kernel", *steps, "marked rows", "memory"], rows)


def certified_parts() -> str:
    found = load_result("certified-h200.json")["parts"]
    times = {(row["groups"], row["queries"], row["keys"]): (row["ms"], row["ms"] / row["bf16_ms"]) for row in found}
    keys = sorted({row["keys"] for row in found})
    rows = []
    for groups, queries in dict.fromkeys((row["groups"], row["queries"]) for row in found):
        cells = [times.get((groups, queries, number)) for number in keys]
        numbers = ["" if cell is None else f"{cell[0]:.2f} ({cell[1]:.2f})" for cell in cells]
        rows.append([f"{groups} x {queries // 1024}K", *numbers])
    return markdown(["groups x queries", *(f"{number // 1024}K keys" for number in keys)], rows)


def certified_inputs() -> str:
    rows = [
        [
            row["name"],
            str(row["rows"]),
            str(row["differ"]),
            str(row["marked"]),
            f"{row['ms']:.2f}",
            f"{row['bf16_ms']:.2f}",
        ]
        for row in load_result("certified-h200.json")["inputs"]
    ]
    return markdown(["keys", "rows", "that differ", "marked", "ms", "bf16 kernel, ms"], rows)


def caches_8_bits() -> str:
    """Ids that differ where keys are in 8 bits, without certificates."""
    by_keys: dict[str, list[str]] = {}
    for row in load_result("selection_8_bits.json")["rows"]:
        cells = by_keys.setdefault(
            f"{row['keys']}, {row['seqlen'] // 1024}K", [f"{row['ids that differ in e4m3']:.1%}"]
        )
        if row["scale per"] != "block":
            cells.append(f"{row['ids that differ in int8 alone']:.1%}")
    rows = [[keys, e4m3, plain, rotated] for keys, (e4m3, rotated, plain) in by_keys.items()]
    return markdown(["keys", "e4m3", "int8", "int8, rotated"], rows)


def caches_int8() -> str:
    """Steps and chunks of prompts with index keys in bf16 and in 8 bits, in one process."""
    found: dict[str, dict[str, dict]] = {}
    for row in load_result("int8-h200.json")["rows"]:
        found.setdefault(_call(row), {})[row["index_dtype"]] = row
    rows = []
    for name, by_dtype in found.items():
        if "bf16" not in by_dtype:
            shares = [f"{by_dtype[dtype]['differ']:.1%}" for dtype in ("e4m3", "int8")]
            rows.append([name, "", *shares, ""])
            continue
        for field in [field for field in ("step_us", "selection_us") if field in by_dtype["bf16"]]:
            times = [by_dtype[dtype][field] for dtype in ("bf16", "e4m3", "int8")]
            cells = [f"{each:.1f} us" if times[0] < 900 else f"{each / 1e3:.2f} ms" for each in times]
            rows.append([f"{field[:-3]}, {name}", *cells, f"{times[2] / times[1]:.2f}"])
    return markdown(["", "bf16", "e4m3", "int8", "int8 / e4m3"], rows)


def _call(row: dict) -> str:
    if "differ" in row:
        return f"ids that differ, {row['keys']:,} normal keys"
    queries = "" if row["queries"] == 1 else f"{row['queries']:,} queries, "
    return f"{queries}{row['batch']} x {row['keys']:,} keys"


def selection_cpu() -> str:
    """Selections on a CPU in fp32 alone, and by a prototype with int8 scores first."""
    rows = []
    for row in load_result("cpu_selection_8_bits.json")["rows"]:
        times = [f"{row[key]:.2f} s" for key in ("fp32_s", "int8_s")]
        case = [f"{row['seqlen'] // 1024}K", *(str(row[key]) for key in ("index_dims", "dtype", "keys", "threads"))]
        rows.append([*case, *times, f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"])
    return markdown(["tokens", "Di", "dtype", "keys", "threads", "fp32", "int8", "faster by"], rows)


SELECTION_TABLES = (
    selection_8_bits,
    certified_lengths,
    certified_parts,
    certified_inputs,
    caches_8_bits,
    caches_int8,
    selection_cpu,
)
