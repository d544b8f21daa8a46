"""What a user picks for any run: the settings that all recipes share, said once.

A contradiction raises ValueError here, naming the fields; nothing is rewritten.
"""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from jalign.data.sources import Source
from jalign.train.optim import OptimConfig
from jalign.train.rows import DataOptions


@dataclass(frozen=True)
class ComputeOptions:
    """Memory against time: none of these changes what is computed, but for bfloat16."""

    microbatches: int = 1
    """Parts each update is cut into; their gradients are added."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; parameters and losses are float32 always."""
    remat: bool = False
    """Recompute activations in the backward pass instead of keeping them."""

    def __post_init__(self):
        check(
            self.microbatches >= 1,
            f"microbatches must be >= 1, got {self.microbatches}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(DataOptions):
    """The fields of every run; a subclass adds its recipe's own."""

    model: str
    """Model to train: a directory in HF format or a hub id."""
    data: Source
    """Training rows: a file, a directory or a hub id; "SOURCE[NAME]" names a split."""
    out: str
    """Directory for model/, checkpoints/, metrics.jsonl and report.html."""
    steps: int | None = None
    """Optimizer steps; overrides epochs."""
    epochs: float = 1.0
    """Passes over the data, when steps is unset."""
    batch_size: int = 8
    """Rows (pairs) of a step, over all devices."""
    max_length: int = 1024
    """Longest row in tokens; what is longer loses its end."""
    seed: int = 0
    """Of the order of the rows, fresh parameters and sampling."""
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; unset puts all devices on fsdp."""
    eval_every: int | None = None
    """Steps between held-out measurements; unset measures before and after only."""
    keep_best: str | None = None
    """A held-out figure, such as loss, accuracy or reward: OUT/model is then the
    checkpoint that was best by it, of those measured."""
    patience: int | None = None
    """The run ends after so many measurements without a better one of keep_best."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    resume: bool = True
    """Continue from the newest good checkpoint in OUT."""
    reschedule: bool = False
    """Continue with another number of steps, although the learning rate depends on it:
    what is left of the run follows the new schedule."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        check(self.epochs > 0, f"epochs must be > 0, got {self.epochs}")
        check(self.max_length >= 2, f"max_length must be >= 2, got {self.max_length}")
        check(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}")
        check(
            self.checkpoint_every >= 0,
            f"checkpoint_every must be >= 0, got {self.checkpoint_every}",
        )
        self._check_guards()

    @property
    def figures(self) -> tuple[str, ...]:
        """Held-out figures that keep_best may name; the first is watched anyway."""
        raise NotImplementedError

    @property
    def watched(self) -> str:
        """The held-out figure by which the model is judged."""
        return self.keep_best or self.figures[0]

    def _check_guards(self) -> None:
        for name in ("eval_every", "patience"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        measured = self.eval_data is not None or self.eval_split is not None
        check(
            measured or self.eval_every is None,
            "eval_every needs held-out rows: eval_data or eval_split",
        )
        check(
            self.keep_best is None or self.eval_every is not None,
            "keep_best chooses among measurements: set eval_every, too",
        )
        check(
            self.patience is None or self.keep_best is not None,
            "patience waits for a better keep_best: set it, too",
        )
        if self.keep_best is not None and self.keep_best not in self.figures:
            close = difflib.get_close_matches(self.keep_best, self.figures, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            check(
                False,
                f"keep_best {self.keep_best!r} is not one of "
                f"{', '.join(self.figures)}{hint}",
            )


def check(ok: bool, message: str) -> None:
    """Raises ValueError with the message unless ok."""
    if not ok:
        raise ValueError(message)
