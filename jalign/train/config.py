"""What a user picks for the offline recipes: frozen dataclasses, flat in use.

A contradiction raises ValueError here, naming both fields; nothing is rewritten.
"""

from dataclasses import dataclass, field

from jalign.train.loss_spec import Term, parse_losses
from jalign.train.loss_table import REGISTRY
from jalign.train.run_config import RunConfig, check


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(RunConfig):
    """What the runs on given rows check together."""

    def __post_init__(self):
        super().__post_init__()
        warmup, parts = self.optim.warmup_steps, self.compute.microbatches
        check(
            self.steps is None or warmup < self.steps,
            f"warmup_steps {warmup} must be less than steps {self.steps}",
        )
        check(
            self.batch_size % parts == 0,
            f"microbatches {parts} does not divide batch_size {self.batch_size}",
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

    def __post_init__(self):
        check(
            self.center_coef >= 0, f"center_coef must be >= 0, got {self.center_coef}"
        )
        terms = self.terms()
        check(
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

    def __post_init__(self):
        _check_scalars(self.terms(), smoothing_below=0.5)

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
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning of a causal language model."""

    sft: SFTOptions = field(default_factory=SFTOptions)

    @property
    def figures(self) -> tuple[str, ...]:
        """What keep_best may name."""
        return "loss", "perplexity"


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineConfig):
    """A reward model from preference pairs, by the Bradley-Terry model."""

    reward: RewardOptions = field(default_factory=RewardOptions)

    @property
    def figures(self) -> tuple[str, ...]:
        """What keep_best may name."""
        return "accuracy", "log_loss", "margin"


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Direct preference optimization; the model itself is the reference."""

    dpo: DPOOptions = field(default_factory=DPOOptions)

    @property
    def figures(self) -> tuple[str, ...]:
        """What keep_best may name."""
        return "accuracy", "log_loss", "margin"

    def __post_init__(self):
        super().__post_init__()
        parts = self.compute.microbatches
        for name, term in self.dpo.terms().items():
            check(
                not term.entry.whole_batch or parts == 1,
                f"loss {name!r} compares the rows of the whole batch: microbatches "
                f"must be 1, got {parts}",
            )


def _check_scalars(terms: dict[str, Term], smoothing_below: float) -> None:
    """Holds the options of every loss, from a flag or from --loss, to their ranges."""
    for name, term in terms.items():
        scalars, where = term.settings, f"(loss {name!r})"
        beta = scalars.get("beta", 1.0)
        check(beta > 0, f"beta must be > 0, got {beta} {where}")
        z_loss = scalars.get("z_loss", 0.0)
        check(z_loss >= 0, f"z_loss must be >= 0, got {z_loss} {where}")
        smoothing = scalars.get("label_smoothing", 0.0)
        check(
            0 <= smoothing < smoothing_below,
            f"label_smoothing must be in [0, {smoothing_below:g}), got {smoothing} "
            f"{where}",
        )


def _given(flags: dict[str, float]) -> dict[str, float]:
    """The flags that are not at their default of 0."""
    return {name: value for name, value in flags.items() if value}
