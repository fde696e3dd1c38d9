"""Draw the pictures of the documents from the committed results: `python -m benchmarks.pictures`.

`make demo` and `make convert-demo` draw their own; the data of the latter are committed, so its pictures are here too.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks import cpu_plot, distributed_plot, gpu_plot
from benchmarks.gpu_tables import ROOT, gpu_rows, load_result
from benchmarks.quality import pictures, published


def draw_gpu(folder: Path) -> None:
    gpu = load_result("gpu-h200.json")["parts"]["training"]["gpu"]
    gpu_plot.draw(gpu_rows().values(), gpu, folder / "gpu.png")


def draw_cpu(folder: Path) -> None:
    result = load_result("cpu.json")
    cpu_plot.draw(result["rows"], result["machine"], folder / "cpu.png")


def draw_processes(folder: Path) -> None:
    distributed_plot.draw(load_result("distributed-h200.json"), folder / "gpu-processes.png")


def draw_conversion(folder: Path) -> None:
    # Its drawing code imports transformers, which the other pictures do not need.
    from flexmsa.integrations.transformers.demo.report import draw_figures

    for name, figure in draw_figures(load_result("conversion.json")).items():
        figure.savefig(folder / f"conversion-{name}.png")


def draw_quality(folder: Path) -> None:
    pictures.draw(published.study(), folder)


PICTURES: tuple[Callable[[Path], None], ...] = (draw_gpu, draw_processes, draw_cpu, draw_conversion, draw_quality)


def main(folder: Path = ROOT / "docs" / "images") -> None:
    for draw in PICTURES:
        draw(folder)


if __name__ == "__main__":
    main()
