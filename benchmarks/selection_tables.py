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


SELECTION_TABLES = selection_8_bits, certified_lengths, certified_inputs
