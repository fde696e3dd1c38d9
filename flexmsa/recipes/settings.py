"""The settings of `python -m flexmsa.recipes.pretrain`: its command line options, and the keys of its --config."""

import argparse
import json
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flexmsa.config import MSAConfig

__all__ = ["Settings", "parse"]

DTYPES = ("auto", "bfloat16", "float32", "float64")
# A run that resumes may have others.
MAY_CHANGE = {
    *("data", "out", "resume", "steps", "replicate", "fsdp", "tp", "cp", "device", "compile"),
    *("activation_checkpointing", "log_every", "save_every"),
}


def option(default: Any, text: str, least: float | None = None) -> Any:
    return field(default=default, metadata={"help": text, "least": least})


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. The metadata of each field says what it is.

    >>> Settings(data="text", steps=8, fsdp=2).mesh_sizes(4)
    Traceback (most recent call last):
    ValueError: replicate, fsdp, tp, cp: expected a product of 4, the number of processes, got 1 x 2 x 1 x 1
    """

    data: str = option("", "folder of the text files, each a document")
    pattern: str = option("*", "which files in it, at any depth")
    out: str = option("out/pretrain", "folder of the checkpoints and of metrics.jsonl")
    resume: bool = option(False, "continue from the newest checkpoint, if there is one")
    steps: int = option(1000, "training steps", 1)
    warm_up: int = option(-1, "steps with dense attention at the beginning; -1: a quarter of the steps", -1)
    batch_size: int = option(8, "rows of a step, of all processes", 1)
    context: int = option(512, "bytes of a row, which holds several documents", 2)
    learning_rate: float = option(3e-3, "at its highest", 0)
    weight_decay: float = option(0.1, "of the matrices", 0)
    max_norm: float = option(1.0, "to which the gradients of index branches and of all else are clipped, each", 0)
    index_loss_weight: float = option(1.0, "factor of the sum over layers of the KL", 0)
    seed: int = option(0, "of the weights and of the order of files")
    num_layers: int = option(3, "blocks of the model", 1)
    hidden_size: int = option(128, "width of the model", 1)
    mlp_size: int = option(384, "width of the MLPs", 1)
    num_heads: int = option(4, "query heads", 1)
    num_kv_heads: int = option(2, "key/value heads, and groups of index queries", 1)
    head_dim: int = option(32, "of queries, keys and values", 1)
    index_head_dim: int = option(32, "of index queries and keys", 1)
    block_size: int = option(16, "keys of a block", 1)
    topk: int = option(4, "blocks that a query attends to after the warm-up", 1)
    replicate: int = option(1, "copies of the sharded parameters, each on other data", 1)
    fsdp: int = option(0, "processes that share parameters, on other data; 0: those that the others leave", 0)
    tp: int = option(1, "processes that share the heads", 1)
    cp: int = option(1, "processes that share the tokens of each row", 1)
    device: str = option("auto", "cpu or cuda; auto: cuda if available")
    dtype: str = option("auto", f"{', '.join(DTYPES)}; bfloat16 computes with float32 weights; auto: by the device")
    compile: bool = option(False, "run each block through torch.compile")
    activation_checkpointing: bool = option(False, "compute activations again in the backward, without selecting again")
    log_every: int = option(10, "steps between lines of the log", 1)
    save_every: int = option(500, "steps between checkpoints", 1)

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: expected a folder of text files, got none")
        for name, least in ((f.name, f.metadata["least"]) for f in fields(self)):
            value = getattr(self, name)
            if least is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.warm_up > self.steps:
            raise ValueError(f"warm_up: expected at most the {self.steps} steps, got {self.warm_up}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype}")
        if self.cp > 1 and self.num_kv_heads < self.tp:
            raise ValueError(
                f"num_kv_heads: expected at least tp = {self.tp} with context parallel, got {self.num_kv_heads}"
            )
        if self.context % self.tp:
            raise ValueError(f"context: expected a multiple of tp, got {self.context} and {self.tp}")
        self.attention()

    @property
    def warm_up_steps(self) -> int:
        """Steps with dense attention."""
        return self.steps // 4 if self.warm_up < 0 else self.warm_up

    def attention(self) -> MSAConfig:
        """The settings of one layer."""
        names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "index_head_dim", "block_size", "topk")
        return MSAConfig(**{name: getattr(self, name) for name in names}, loss_in_backward=True)

    def mesh_sizes(self, world: int) -> tuple[int, int, int, int]:
        """replicate, fsdp, tp and cp of `world` processes.

        Raises:
            ValueError: their product is not `world`, or their rows do not divide.
        """
        fsdp = self.fsdp or max(1, world // (self.replicate * self.tp * self.cp))
        sizes = self.replicate, fsdp, self.tp, self.cp
        if self.replicate * fsdp * self.tp * self.cp != world:
            raise ValueError(
                f"replicate, fsdp, tp, cp: expected a product of {world}, the number of processes, got "
                f"{' x '.join(map(str, sizes))}"
            )
        if self.batch_size % (self.replicate * fsdp):
            raise ValueError(
                f"batch_size: expected a multiple of replicate x fsdp = {self.replicate * fsdp}, got {self.batch_size}"
            )
        return sizes

    def save(self, path: Path, files: str) -> None:
        """Write the settings as JSON, for `check_same`; files: the text's digest."""
        path.write_text(json.dumps({**asdict(self), "warm_up": self.warm_up_steps, "files": files}, indent=1))

    def check_same(self, path: Path, files: str) -> None:
        """Raise ValueError if a run with the settings and the text in a file cannot continue with these."""
        there = json.loads(path.read_text())
        here = {**asdict(self), "warm_up": self.warm_up_steps, "files": files}
        changed = [
            f"{name} is {there.get(name)} there and {here[name]} here"
            for name in here
            if name not in MAY_CHANGE and there.get(name) != here[name]
        ]
        if changed:
            advice = "; by default warm_up is a quarter of the steps" if "warm_up is" in "".join(changed) else ""
            raise ValueError(f"resume: expected the settings and text of {path}, but {'; '.join(changed)}{advice}")


def parse(argv: list[str]) -> Settings:
    """Read the command line; wrong options end the program with a message."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa.recipes.pretrain",
        description="Train a byte-level language model with MSA on text files: a dense warm-up, then sparse. With "
        "several processes: torchrun --nproc-per-node N -m flexmsa.recipes.pretrain ...",
    )
    parser.add_argument("--config", metavar="FILE", help=".toml or .json file of settings; options replace its own")
    for setting in fields(Settings):
        kind, text = type(setting.default), f"{setting.metadata['help']} (default: {setting.default})"
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument(f"--{setting.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    try:
        path = given.pop("config")
        return Settings(**{**(read(Path(path)) if path else {}), **given})
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def read(path: Path) -> dict[str, Any]:
    """The settings in a .toml or .json file.

    Raises:
        ValueError: a key is no setting, or its value has another type.
    """
    found = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    kinds = {setting.name: type(setting.default) for setting in fields(Settings)}
    for name, value in found.items():
        if name not in kinds:
            raise ValueError(f"{path}: expected settings, got {name}; --help lists them")
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise ValueError(f"{path}: expected {name} to be {kinds[name].__name__}, got {value!r}")
    return found
