"""Everything that an arm depends on: the full study, and a quick one for a CPU."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from flexmsa.config import MSAConfig

__all__ = ["FULL", "QUICK", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Sizes of the text, the model, the training and the measurements.

    Attributes:
        vocabulary: tokens, of which the tokenizer's last are seldom.
        text_bytes: of all packages, beyond which no package is added.
        package_bytes: larger packages are left out.
        tokenizer_bytes: of training text, from which the tokenizer learns.
        heldout_percent: of the packages, by a hash of the name.
        heldout_rows, rows_per_package: most rows of held-out text, and most of one package.
        context, batch_rows: tokens of a row, rows of a batch.
        short_context, short_rows, short_steps: of the first phase, dense and on shorter rows, which all arms share.
        steps, warm_up: the base model's steps after it, and those of dense attention first in arms that select.
        convert_at, index_steps: dense steps before the conversion, and those of its first phase, which come on top.
        few: topk of the arm with a small budget.
        measure_every: steps between measurements of the recalls.
        letters: of each alphabet of the retrieval task, see retrieval.py.
        statements: the most that a row of training text has, and as many questions; in proportion in shorter rows.
        needle_lengths, needle_samples: of the retrieval test; samples for each length and depth.
        pairs: of the test of associative recall.
        speed_lengths: at which training steps are timed.
    """

    vocabulary: int = 16384
    text_bytes: int = 300_000_000
    package_bytes: int = 200_000_000
    tokenizer_bytes: int = 20_000_000
    heldout_percent: int = 12
    heldout_rows: int = 128
    rows_per_package: int = 16
    context: int = 16384
    batch_rows: int = 2
    short_context: int = 512
    short_rows: int = 32
    short_steps: int = 2500
    steps: int = 1000
    warm_up: int = 200
    convert_at: int = 600
    index_steps: int = 100
    num_layers: int = 12
    hidden_size: int = 768
    mlp_size: int = 2048
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    index_head_dim: int = 128
    rotary_dim: int = 64
    rope_theta: float = 10_000.0
    block_size: int = 128
    topk: int = 16
    few: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    max_norm: float = 1.0
    log_every: int = 20
    measure_every: int = 100
    letters: int = 64
    statements: int = 192
    needle_lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    needle_samples: int = 8
    pairs: int = 64
    speed_lengths: tuple[int, ...] = (16384, 32768, 65536, 131072)

    def attention(self, topk: int | None = None) -> MSAConfig:
        """The settings of one layer; topk: the study's own unless given."""
        names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "index_head_dim", "block_size")
        values = {name: getattr(self, name) for name in (*names, "rotary_dim", "rope_theta")}
        return MSAConfig(**values, topk=topk or self.topk, loss_in_backward=True)

    def row_sizes(self, short: bool) -> tuple[int, int]:
        """The tokens of a row, and the rows of a batch: in the first phase, and later."""
        return (self.short_context, self.short_rows) if short else (self.context, self.batch_rows)

    def shortened(self, steps: int) -> "Settings":
        """A run of so many steps behind the short phase, with all phases in proportion."""
        names = ("short_steps", "warm_up", "convert_at", "index_steps")
        return replace(self, steps=steps, **{name: max(1, getattr(self, name) * steps // self.steps) for name in names})

    def lengthened(self, steps: int) -> "Settings":
        """A run of so many steps behind the short phase, with the other phases as they are.

        Raises:
            ValueError: there is no step for each phase.
        """
        least = max(self.warm_up, self.convert_at) + 1
        if steps < least:
            raise ValueError(f"long steps: expected at least {least}, got {steps}")
        return replace(self, steps=steps)

    def text_key(self) -> str:
        """A name for what the text depends on."""
        names = (
            "vocabulary",
            "letters",
            "text_bytes",
            "package_bytes",
            "tokenizer_bytes",
            "heldout_percent",
            "context",
        )
        return digest({name: getattr(self, name) for name in names})

    def key(self) -> str:
        """A name for the settings: figures of two runs are compared only if it is the same."""
        return digest(asdict(self))


def digest(found: object) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


FULL = Settings()
QUICK = replace(
    FULL,
    **{"vocabulary": 512, "text_bytes": 600_000, "package_bytes": 150_000, "tokenizer_bytes": 100_000},
    **{"heldout_percent": 30, "heldout_rows": 6, "rows_per_package": 2, "context": 256, "batch_rows": 2},
    **{
        "short_context": 64,
        "short_rows": 4,
        "short_steps": 4,
        "steps": 10,
        "warm_up": 3,
        "convert_at": 6,
        "index_steps": 2,
    },
    **{"num_layers": 2, "hidden_size": 32, "rotary_dim": 8},
    **{"mlp_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "index_head_dim": 8, "block_size": 16},
    **{"topk": 4, "few": 2, "log_every": 1, "measure_every": 4, "letters": 8, "statements": 6},
    **{"needle_lengths": (128, 256, 512), "needle_samples": 2, "pairs": 8, "speed_lengths": (128, 256)},
)
