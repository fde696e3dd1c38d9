"""Tables of the results of `benchmarks/gpu.py`, for `benchmarks/tables.py`."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PATTERNS = ("random", "block 0 hot", "neighbours share", "8 hot blocks")


def load_result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gpu_machine() -> str:
    """The machines of the runs that measured the parts."""
    runs = load_result("gpu-h200.json")["parts"].values()
    said = (f"{run['gpu']}, driver {run['driver']}, torch {run['torch']}, triton {run['triton']}" for run in runs)
    return "; ".join(dict.fromkeys(said)) + "."


def gpu_rows() -> dict[str, dict]:
    """Rows by name. One run measures a whole part, and no ratio mixes parts."""
    return {row["name"]: row for row in load_result("gpu-h200.json")["rows"]}


def gpu_selection() -> str:
    found = gpu_rows()

    def cells(name: str) -> list[str]:
        if name not in found:
            return [""] * 3
        ms, floor = found[name]["ms"], found[name]["floor_ms"]
        return [f"{ms:.3f} ms", f"{floor:.3f} ms", f"{floor / ms:.2f}"]

    plain = [name for name in found if name.startswith("selection ") and not name.startswith("selection e4m3 ")]
    shapes = [name.removeprefix("selection ") for name in plain]
    rows = [[shape, *cells(f"selection {shape}"), *cells(f"selection e4m3 {shape}")] for shape in shapes]
    return markdown(
        ["queries x keys", "bf16", "FLOP floor", "floor / time", "e4m3", "FLOP floor", "floor / time"], rows
    )


def gpu_decode() -> str:
    found = gpu_rows()
    shapes = [name.removeprefix("decode ").split(":")[0] for name in found if name.endswith(": bf16 step")]
    dense = {"cudnn": "dense cuDNN", "flex": "dense FlexAttention"}
    dense = {name: head for name, head in dense.items() if f"decode {shapes[0]}: dense {name}" in found}
    rows = []
    for shape in shapes:
        times = [found[f"decode {shape}: dense {name}"]["ms"] for name in dense]
        cells = [shape, *(f"{1e3 * ms:.0f} us" if ms else "" for ms in times)]
        for kind in ("bf16", "e4m3"):
            step = found[f"decode {shape}: {kind} step"]
            cells += [f"{1e3 * ms:.0f} us" for ms in (step["ms"], step["floor_ms"])] + [f"{times[0] / step['ms']:.1f}x"]
        rows.append(cells)
    ours = [head for kind in ("bf16", "e4m3") for head in (f"{kind} index keys", "byte floor", "speedup")]
    return markdown(["batch x keys", *dense.values(), *ours], rows)


def gpu_grid() -> str:
    """Decoding steps over a grid of batches and lengths, each with its byte floor."""
    steps = {}
    for name, row in gpu_rows().items():
        if name.startswith("decode ") and name.count(" x ") == 2:
            batch, keys, tokens = name.removeprefix("decode ").removesuffix(": step").split(" x ")
            steps[int(batch), int(keys), int(tokens)] = row
    lengths = sorted({keys for _, keys, _ in steps})
    rows = []
    for batch, tokens in sorted({(batch, tokens) for batch, _, tokens in steps}):
        cells = [steps.get((batch, keys, tokens)) for keys in lengths]
        shown = [f"{1e3 * row['ms']:.0f} ({1e3 * row['floor_ms']:.0f})" if row else "" for row in cells]
        rows.append([str(batch), str(tokens), *shown])
    return markdown(["batch", "new tokens", *(f"{keys // 1000}K keys" for keys in lengths)], rows)


def gpu_chunks() -> str:
    """Chunks of a prompt over a filled prefix, and their mean weighted by the number of calls in production."""
    found, rows = gpu_rows(), []
    total = {"ours": 0.0, "dense": 0.0}
    for shape, calls in workload_weights().items():
        ours, dense = (found[f"chunk {shape}: {what}"]["ms"] for what in ("selection and attention", "dense"))
        total = {"ours": total["ours"] + calls * ours, "dense": total["dense"] + calls * dense}
        rows.append([shape, str(calls), f"{ours:.2f} ms", f"{dense:.2f} ms", f"{dense / ours:.1f}x"])
    calls = sum(workload_weights().values())
    ours, dense = total["ours"] / calls, total["dense"] / calls
    rows.append(["weighted mean", str(calls), f"{ours:.2f} ms", f"{dense:.2f} ms", f"{dense / ours:.1f}x"])
    return markdown(["queries x keys", "calls", "flexmsa", "dense", "speedup"], rows)


def workload_weights() -> dict[str, int]:
    """Number of production calls that each chunk of the GPU benchmark represents."""
    return {name: row["calls"] for name, row in load_result("gpu-h200.json")["chunks"].items()}


def layer_times(seqlen: int, pattern: str) -> dict[str, float]:
    """Milliseconds of a training layer's steps, and of dense attention's."""
    found = gpu_rows()

    def ms(name: str) -> float:
        return found[f"layer {seqlen}: {name}"]["ms"]

    return {
        "selection": ms("selection"),
        "forward": ms(f"{pattern}, main branch, forward"),
        "backward": ms(f"{pattern}, main branch, backward"),
        "loss": ms(f"{pattern}, KL value and gradient"),
        "dense": ms("dense cuDNN, forward") + ms("dense cuDNN, backward"),
    }


def layer_lengths() -> list[int]:
    return [
        int(name.split(":")[0].removeprefix("layer "))
        for name in gpu_rows()
        if name.endswith(": dense cuDNN, forward") and name.startswith("layer ")
    ]


def gpu_training() -> str:
    rows = []
    for seqlen in layer_lengths():
        for pattern in ("random", "neighbours share"):
            layer = layer_times(seqlen, pattern)
            dense = layer.pop("dense")
            ours = sum(layer.values())
            times = (f"{time:.1f} ms" for time in (*layer.values(), ours, dense))
            launches = gpu_rows().get(f"layer {seqlen}: launches")
            host = "" if launches is None else f"{launches['ms']:.1f} ms"
            rows.append([f"{seqlen // 1024}K", pattern, *times, f"{dense / ours:.1f}x", host])
    steps = ["selection", "forward", "backward", "KL loss", "total"]
    return markdown(["tokens", "selected blocks", *steps, "dense cuDNN", "speedup", "host launches"], rows)


def gpu_floors() -> str:
    found = gpu_rows()
    rows = []
    for step in ("main branch, forward", "main branch, backward", "KL value and gradient"):
        floor = found[f"floor 131072: {step}"]["ms"]
        by_bytes = found.get(f"floor 131072: {step}, bytes in KV-outer order")
        cells = [f"{found[f'layer 131072: {pattern}, {step}']['ms']:.1f} ms" for pattern in PATTERNS]
        rows.append([step, *cells, f"{floor:.1f} ms", "" if by_bytes is None else f"{by_bytes['ms']:.1f} ms"])
    return markdown(["step at 128K tokens", *PATTERNS, "products alone", "bytes alone, key-major"], rows)


def gpu_prefill() -> str:
    found, rows = gpu_rows(), []

    def ms(step: str) -> float:
        return found[f"prefill 1048576: {step}"]["ms"]

    dense = ms("dense cuDNN, forward")
    for pattern in ("random", "neighbours share"):
        for scores, step in (("bf16", "selection"), ("e4m3", "selection, e4m3")):
            selection, main = ms(step), ms(f"{pattern}, main branch, forward")
            times = (f"{time:.0f} ms" for time in (selection, main, dense))
            rows.append([pattern, scores, *times, f"{dense / (selection + main):.1f}x"])
    return markdown(["selected blocks", "index scores", "selection", "main branch", "dense cuDNN", "speedup"], rows)


def gpu_steps() -> str:
    """Wall-clock time of a training step of the layer: eager, compiled, and in CUDA graphs."""
    found = gpu_rows()
    ways = ("eager", "default", "reduce-overhead")
    rows = []
    for tokens in (4096, 8192, 16384):
        rows.append([f"{tokens // 1024}K", *(f"{found[f'step {tokens}: {way}']['ms']:.1f} ms" for way in ways)])
    return markdown(["tokens", "eager", "`torch.compile`", '`mode="reduce-overhead"`'], rows)


def gpu_flex() -> str:
    """The main branch by FlexAttention and by the Triton kernels; the latter rows are of the part `training`."""
    found = gpu_rows()
    rows = []
    for pattern in ("random", "neighbours share"):
        for kind, name in (("Triton", "main branch"), ("FlexAttention", "main branch by FlexAttention")):
            times = (found[f"layer 32768: {pattern}, {name}, {step}"]["ms"] for step in ("forward", "backward"))
            rows.append([pattern, kind, *(f"{time:.1f} ms" for time in times)])
    return markdown(["selected blocks", "kernels", "forward", "backward"], rows)


def gpu_peers() -> str:
    """The main branch and its peers."""
    times: dict[tuple[str, str], dict[tuple[int, str], float | str]] = {}
    for row in load_result("gpu-h200.json")["rows"]:
        if row["part"] == "peers" and row["name"].startswith("peers "):
            seqlen, what = row["name"].removeprefix("peers ").split(": ")
            peer, blocks, direction = what.split(", ")
            times.setdefault((peer, blocks), {})[int(seqlen), direction] = row["ms"]
    lengths = sorted({seqlen for by_length in times.values() for seqlen, _ in by_length})

    def cell(ms: float | str | None) -> str:
        # Where there is no time, a string gives the reason.
        return f"{ms:.1f}" if isinstance(ms, float) else "-"

    rows = []
    for (peer, blocks), by_length in times.items():
        pairs = [[by_length.get((seqlen, step)) for step in ("forward", "backward")] for seqlen in lengths]
        rows.append([peer, blocks, *(f"{cell(forward)} / {cell(backward)}" for forward, backward in pairs)])
    head = ["forward / backward, ms", "attends to", *(f"{seqlen // 1024}K" for seqlen in lengths)]
    return markdown(head, rows)


def gpu_peer_steps() -> str:
    """A training step of a layer beside other MSA that trains; nothing if it was not timed."""
    times: dict[str, dict[str, float | str]] = {}
    for name, row in gpu_rows().items():
        if row["part"] == "peers" and name.startswith("step "):
            layer, peer = name.removeprefix("step ").split(": ")
            times.setdefault(layer, {})[peer] = row["ms"]
    peers = list(dict.fromkeys(peer for by_peer in times.values() for peer in by_peer))
    rows = []
    for layer, by_peer in times.items():
        heads, seqlen = layer.split(", ")
        ours = by_peer["flexmsa"]
        cells = []
        for ms in (by_peer.get(peer) for peer in peers):
            ratio = f" ({ms / ours:.1f}x)" if isinstance(ms, float) and isinstance(ours, float) and ms != ours else ""
            cells.append(f"{ms:.1f}{ratio}" if isinstance(ms, float) else "-")
        rows.append([heads, f"{int(seqlen) // 1024}K", *cells])
    return markdown(["heads", "tokens", *(f"{peer}, ms" for peer in peers)], rows) if rows else ""


def gpu_heads() -> str:
    """A training step of a layer at several numbers of heads, its loss in the backward; empty without measurements."""
    found = gpu_rows()
    rows = []
    for name, ours in found.items():
        if name.startswith("heads ") and name.endswith("random, together"):
            layout = name.removesuffix("random, together")
            tokens = int(layout.removesuffix(": ").rpartition(", ")[2])
            steps = [found[f"{layout}{step}"]["ms"] for step in ("selection", "random, forward")]
            steps += [found[f"{layout}random, backward with loss"]["ms"], ours["ms"]]
            times = (f"{ms:.1f}" for ms in (*steps, ours["goal"], found[f"{layout}shared, together"]["ms"]))
            dense = f"{found[f'{layout}dense cuDNN']['ms']:.0f}"
            heads, blocks, *_ = layout.removeprefix("heads ").split(", ")
            heads += "" if blocks == "blocks 128" else f", {blocks.replace(' ', ' of ')}"
            rows.append([heads, f"{tokens // 1024}K", *times, dense, f"{ours['faster']:.1f}x"])
    steps = [
        "selection",
        "forward",
        "backward and loss",
        "together",
        "goal",
        "neighbours share",
        "dense cuDNN",
        "speedup",
    ]
    return markdown(["heads", "tokens", *steps], rows) if rows else ""


def gpu_model() -> str:
    """Training steps of a whole model, dense and converted, with their peak memory; empty without measurements."""
    found = gpu_rows()
    rows = []
    for name, ours in found.items():
        of_length, ours_saved, saved = name.partition(": flexmsa")
        if name.startswith("model ") and ours_saved:
            dense = {kind: found[f"{of_length}: dense {kind}"] for kind in ("flash", "cuDNN")}
            times = (f"{row['ms']:.0f} ms" if isinstance(row["ms"], float) else "-" for row in (*dense.values(), ours))
            faster = f"{ours['ratio']:.2f}x", f"{ours['ratio_bar']:g}"
            memory = f"{dense['cuDNN']['gib']:.1f} GiB", f"{ours['gib']:.1f} GiB", f"{ours['gib_bar']:g} GiB"
            tokens = int(of_length.removeprefix("model "))
            kept = "attention" if saved else "selection"
            rows.append([f"{tokens // 1024}K", kept, *times, *faster, *memory])
    times = ["dense flash", "dense cuDNN", "flexmsa", "speedup", "goal", "memory, dense", "flexmsa", "goal"]
    head = ["tokens", "saved", *times]
    return markdown(head, rows) if rows else ""


def gpu_shares() -> str:
    """The slowest process's step of context parallel beside one process's, nothing sent; empty without measurements."""
    steps: dict[str, list[dict]] = {}
    for name, row in gpu_rows().items():
        if row["part"] == "shares":
            steps.setdefault(name.removeprefix("shares ").rpartition(": ")[0], []).append(row)
    rows = []
    for name, (one, *shares) in steps.items():
        heads, tokens, kind = name.split(", ")
        cells = (f"{row['ms']:.0f} ({row['ratio']:.2f}), {row['gib']:.0f} GiB" for row in shares)
        rows.append([heads, f"{int(tokens) // 1024}K", kind, f"{one['ms']:.0f}, {one['gib']:.0f} GiB", *cells])
    worlds = (row["name"].rpartition(": ")[2] for row in next(iter(steps.values()), [{}])[1:])
    head = ["heads", "tokens", "documents", "1 process, ms", *(f"{world} processes" for world in worlds)]
    return markdown(head, rows) if rows else ""


def _or_dash(value: float | None, how: str) -> str:
    """The number, or a dash where nothing was measured."""
    return "-" if value is None else f"{value:{how}}"


def gpu_processes() -> str:
    """Steps of context parallel on several GPUs beside one: attention, then a model."""
    found = load_result("distributed-h200.json")
    rows = []
    for row in found["attention"]:
        times = (_or_dash(row[name], ".0f") for name in ("one_ms", "share_ms", "step_ms"))
        shares = (_or_dash(row[name], ".0%") for name in ("exposed", "efficiency"))
        dense = row["dense_ms"]
        beside = "-" if dense is None else f"{dense:.0f} ({dense / row['step_ms']:.1f}x)"
        names = row["heads"], f"{row['tokens'] // 1024}K", str(row["processes"])
        rows.append([*names, *times, *shares, f"{row['memory_gib']:.1f} GiB", beside])
    times = ["1 GPU, ms", "share, ms", "step, ms"]
    head = ["heads", "tokens", "GPUs", *times, "exposed", "efficiency", "memory", "dense, ms"]
    models = (
        f"The model of the table above that saves the selection, at {row['tokens'] // 1024}K tokens, with FSDP2 and "
        f"context parallel:\n{_or_dash(row['one_ms'], '.0f')} ms on one GPU, {row['step_ms']:.0f} on "
        f"{row['processes']} ({_or_dash(row['efficiency'], '.0%')}), {row['memory_gib']:.1f} GiB on each."
        for row in found["model"]
    )
    return f"{found['machine']}, torch {found['torch']}.\n\n{markdown(head, rows)}\n\n" + "\n".join(models)


def gpu_processes_decode() -> str:
    """A decoding step on several GPUs beside one."""
    rows = []
    for row in load_result("distributed-h200.json")["decode"]:
        times = (_or_dash(row.get(name), ".0f") for name in ("one_us", "heads_us", "keys_us"))
        rows.append([row["heads"], f"{row['tokens'] // 1024}K", str(row["processes"]), *times])
    return markdown(["heads", "keys", "GPUs", "1 GPU, us", "by heads, us", "by keys, us"], rows)


LAYER_TABLES = (
    gpu_training,
    gpu_heads,
    gpu_model,
    gpu_shares,
    gpu_processes,
    gpu_processes_decode,
    gpu_floors,
    gpu_prefill,
    gpu_steps,
    gpu_flex,
    gpu_peers,
    gpu_peer_steps,
)
GPU_TABLES = gpu_machine, gpu_selection, gpu_decode, gpu_grid, gpu_chunks, *LAYER_TABLES
