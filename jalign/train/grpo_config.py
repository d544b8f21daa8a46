"""What a user picks for GRPO and its relatives: frozen dataclasses."""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from jalign.train.loss_spec import Term, option_names, parse_losses
from jalign.train.loss_table import REGISTRY, Entry
from jalign.train.online_config import OnlineConfig, OnlineOptions, ScoreLimits
from jalign.train.run_config import check


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(OnlineOptions):
    """The algorithm's own dials (Shao et al. 2024; defaults as in TRL 1.16)."""

    group_size: int = 8
    """Completions of each prompt; a rollout has batch_size x group_size rows."""
    loss: str = "dapo"
    """A policy loss, as "gspo:clip_eps=1e-3", or a sum of several."""
    clip_eps: float | None = None
    """Bound of the ratio's fall; unset takes each loss's own, 0.2 for most."""
    clip_eps_high: float | None = None
    """Bound of its rise; unset takes gspo's and luspo's 4e-4, for others clip_eps."""
    beta: float = 0.0
    """Weight of the KL to the reference (k3) in the loss; 0 runs no reference."""
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    """Whose deviation divides reward - group mean; auto takes each loss's own way."""
    mask_truncated: bool = False
    """Train no token of a completion that did not stop within max_new_tokens."""
    rewards: ScoreLimits = field(default_factory=ScoreLimits)

    def __post_init__(self):
        super().__post_init__()
        check(
            self.group_size >= 2,
            f"group_size must be >= 2, got {self.group_size}: a completion is compared "
            "with the others of its prompt",
        )
        check(self.beta >= 0, f"beta must be >= 0, got {self.beta}")
        terms = self.terms()
        for name, term in terms.items():
            _check_clip(name, term)
            updates = self.updates_per_rollout
            check(
                "old_logps" in term.entry.inputs or updates == 1,
                f"loss {name!r} takes no notice of how far the policy has moved since "
                f"the rollout: num_epochs x num_minibatches must be 1, got {updates}",
            )
        ways = {(t.entry.reduction, t.entry.advantages) for t in terms.values()}
        check(
            len(ways) == 1,
            f"loss {self.loss!r}: its terms are averaged in different ways (tokens, "
            "sequences) or have different advantages, and cannot be summed",
        )

    def terms(self) -> dict[str, Term]:
        """The losses to sum, with the flags as their options."""
        flags = {"clip_eps": self.clip_eps, "clip_eps_high": self.clip_eps_high}
        return parse_losses(self.loss, REGISTRY["grpo"], flags)

    @property
    def entry(self) -> Entry:
        """The registry's, which all terms agree with in advantages and reduction."""
        return next(iter(self.terms().values())).entry

    @property
    def reduction(self) -> Any:
        """(x [B, T], mask) -> (sum, count), as the loss is averaged."""
        reduction: Any = self.entry.reduction
        if "length" in option_names(reduction):
            length = float(self.sampling.max_new_tokens)
            return functools.partial(reduction, length=length)
        return reduction


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """One GRPO run: prompts, several completions of each, and their rewards compared.

    There is no critic. batch_size counts prompts: a rollout has batch_size x group_size
    completions, and all statistics are over the whole of it.
    """

    grpo: GRPOOptions = field(default_factory=GRPOOptions)

    @property
    def options(self) -> GRPOOptions:
        """The algorithm's own."""
        return self.grpo

    @property
    def group_size(self) -> int:
        """Completions of each prompt in a rollout."""
        return self.grpo.group_size

    @property
    def has_reference(self) -> bool:
        """Whether the loss or a limit needs the frozen reference."""
        return self.grpo.beta > 0 or self.stop_kl is not None


def _check_clip(name: str, term: Term) -> None:
    """Holds the bounds, from a flag or from --loss, to their range."""
    for option in ("clip_eps", "clip_eps_high"):
        value = term.settings.get(option)
        check(
            value is None or value > 0,
            f"{option} must be > 0, got {value} (loss {name!r})",
        )
    low = term.settings.get("clip_eps")
    check(
        name == "gmpo" or low is None or low < 1,  # gmpo's are of the logarithm
        f"clip_eps must be < 1, got {low} (loss {name!r}): ratios are positive",
    )
