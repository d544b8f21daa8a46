"""What a user picks for the offline recipes: frozen dataclasses, flat in use.

A contradiction raises ValueError here, naming both fields; nothing is rewritten.
"""

from dataclasses import dataclass, field

from jalign.losses.registry import REGISTRY
from jalign.train.loss_spec import Term, parse_losses
from jalign.train.online_config import ComputeOptions
from jalign.train.optim import OptimConfig
from jalign.train.rows import DataOptions


@dataclass(frozen=True, kw_only=True)
class RunConfig(DataOptions):
    """The fields that SFT, reward and DPO runs share."""

    model: str
    """Model to train: a directory in HF format or a hub id."""
    data: str
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
    """Of the order of the rows and of fresh parameters."""
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; unset puts all devices on fsdp."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    resume: bool = True
    """Continue from the newest good checkpoint in OUT."""
    reschedule: bool = False
    """Continue with another number of steps, although the learning rate depends on it:
    what is left of the run follows the new schedule."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "steps"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        _check(self.epochs > 0, f"epochs must be > 0, got {self.epochs}")
        _check(self.max_length >= 2, f"max_length must be >= 2, got {self.max_length}")
        _check(0 <= self.seed < 2**32, f"seed must be in [0, 2**32), got {self.seed}")
        _check(
            self.checkpoint_every >= 0,
            f"checkpoint_every must be >= 0, got {self.checkpoint_every}",
        )
        warmup = self.optim.warmup_steps
        _check(
            self.steps is None or warmup < self.steps,
            f"warmup_steps {warmup} must be less than steps {self.steps}",
        )


@dataclass(frozen=True)
class SFTOptions:
    """What is particular to supervised fine-tuning."""

    packing: bool = False
    """Put several short rows behind each other into rows of max_length."""
    assistant_only: bool | None = None
    """Train only the assistant's turns; unset does so for conversations."""
    completion_only: bool | None = None
    """Train only the completion; unset does so for prompt + completion rows."""
    loss: str = "sft"
    """A loss, or a sum such as "sft:z_loss=1e-4 + 0.5*dft"."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps the logits' scale down."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self):
        _check_scalars(self.terms(), smoothing_below=1.0)

    def terms(self) -> dict[str, Term]:
        """The losses to sum, with the flags as their options."""
        flags = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        return parse_losses(self.loss, REGISTRY["sft"], _given(flags))


@dataclass(frozen=True)
class RewardOptions:
    """What is particular to reward models."""

    loss: str = "bradley_terry"
    """A loss, or a sum such as "bradley_terry + 0.01*center"."""
    center_coef: float = 0.0
    """Weight of (chosen + rejected)^2, which holds rewards near 0; try 0.01."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self):
        _check(
            self.center_coef >= 0, f"center_coef must be >= 0, got {self.center_coef}"
        )
        terms = self.terms()
        _check(
            not self.center_coef or "center" not in terms,
            "center is in --loss already: drop --center-coef",
        )

    def terms(self) -> dict[str, Term]:
        """The losses to sum."""
        return parse_losses(self.loss, REGISTRY["reward"])


@dataclass(frozen=True)
class DPOOptions:
    """What is particular to direct preference optimization."""

    loss: str = "dpo"
    """A loss, or a sum such as "dpo:beta=0.1 + 0.2*sft"."""
    beta: float | None = None
    """Strength of the implicit KL penalty; unset takes each loss's own, dpo's 0.1."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences, in [0, 0.5)."""
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self):
        _check_scalars(self.terms(), smoothing_below=0.5)
        for name, term in self.terms().items():
            _check(
                not term.entry.whole_batch or self.compute.microbatches == 1,
                f"loss {name!r} compares the rows of the whole batch: microbatches "
                f"must be 1, got {self.compute.microbatches}",
            )

    def terms(self) -> dict[str, Term]:
        """The losses to sum, with the flags as their options."""
        flags = {"beta": self.beta} | _given({"label_smoothing": self.label_smoothing})
        return parse_losses(self.loss, REGISTRY["dpo"], flags)

    @property
    def reward_beta(self) -> float:
        """The scale of the implicit rewards in metrics: the first loss's beta."""
        options = (term.settings.get("beta") for term in self.terms().values())
        return next((beta for beta in options if beta is not None), 0.1)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(RunConfig):
    """Supervised fine-tuning of a causal language model."""

    sft: SFTOptions = field(default_factory=SFTOptions)

    def __post_init__(self):
        super().__post_init__()
        _check_microbatches(self.batch_size, self.sft.compute)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(RunConfig):
    """A reward model from preference pairs, by the Bradley-Terry model."""

    reward: RewardOptions = field(default_factory=RewardOptions)

    def __post_init__(self):
        super().__post_init__()
        _check_microbatches(self.batch_size, self.reward.compute)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(RunConfig):
    """Direct preference optimization; the model itself is the reference."""

    dpo: DPOOptions = field(default_factory=DPOOptions)

    def __post_init__(self):
        super().__post_init__()
        _check_microbatches(self.batch_size, self.dpo.compute)


def _check_microbatches(batch_size: int, compute: ComputeOptions) -> None:
    _check(
        batch_size % compute.microbatches == 0,
        f"microbatches {compute.microbatches} does not divide batch_size {batch_size}",
    )


def _check_scalars(terms: dict[str, Term], smoothing_below: float) -> None:
    """Holds the options of every loss, from a flag or from --loss, to their ranges."""
    for name, term in terms.items():
        scalars, where = term.settings, f"(loss {name!r})"
        beta = scalars.get("beta", 1.0)
        _check(beta > 0, f"beta must be > 0, got {beta} {where}")
        z_loss = scalars.get("z_loss", 0.0)
        _check(z_loss >= 0, f"z_loss must be >= 0, got {z_loss} {where}")
        smoothing = scalars.get("label_smoothing", 0.0)
        _check(
            0 <= smoothing < smoothing_below,
            f"label_smoothing must be in [0, {smoothing_below:g}), got {smoothing} "
            f"{where}",
        )


def _given(flags: dict[str, float]) -> dict[str, float]:
    """The flags that are not at their default of 0."""
    return {name: value for name, value in flags.items() if value}


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
