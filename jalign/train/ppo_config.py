"""What a user picks for PPO: frozen dataclasses; a contradiction is an error here."""

from dataclasses import dataclass, field

from jalign.train.online_config import OnlineConfig, OnlineOptions, ScoreLimits
from jalign.train.run_config import check


@dataclass(frozen=True)
class KLConfig:
    """How the policy is held to the reference, inside the per-token reward."""

    kl_coef: float = 0.05
    """Reward lost per nat of log(policy/reference), at every token."""
    kl_target: float | None = None
    """Nats per sequence to hold by adapting kl_coef; unset keeps kl_coef fixed."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive coefficient reacts (Ziegler et al. 2019)."""

    def __post_init__(self):
        check(self.kl_coef >= 0, f"kl_coef must be >= 0, got {self.kl_coef}")
        check(self.kl_horizon > 0, f"kl_horizon must be > 0, got {self.kl_horizon}")
        if self.kl_target is not None:
            check(self.kl_target > 0, f"kl_target must be > 0, got {self.kl_target}")
            # The update multiplies the coefficient: from 0 it would never move.
            check(self.kl_coef > 0, "kl_target needs kl_coef > 0 to start from")


@dataclass(frozen=True)
class CriticConfig:
    """What estimates the value of a state: a model of its own, or a head."""

    shared_trunk: bool = False
    """The critic is a second head of the policy: one pass and one update for both."""
    value_coef: float | None = None
    """With shared_trunk, weight of the value loss beside the policy's; unset is 0.1."""
    value_clip_eps: float = 0.2
    """The critic may move this far from its values at rollout time."""
    critic_learning_rate: float | None = None
    """The critic's peak learning rate; unset takes the policy's."""
    save_critic: bool = False
    """Also write OUT/critic, the value model, in HF format."""

    def __post_init__(self):
        weight, clip = self.value_coef, self.value_clip_eps
        check(weight is None or weight > 0, f"value_coef must be > 0, got {weight}")
        check(clip > 0, f"value_clip_eps must be > 0, got {clip}")
        check(
            self.shared_trunk or weight is None,
            "value_coef is for shared_trunk: a critic of its own has one loss",
        )
        check(
            not (self.shared_trunk and self.critic_learning_rate is not None),
            "critic_learning_rate: with shared_trunk there is one learning rate",
        )


@dataclass(frozen=True)
class ScoreOptions(ScoreLimits):
    """What happens to a sequence's reward before and when it is spread over tokens."""

    whiten_rewards: bool = False
    """Divide the token rewards by their standard deviation (their mean stays)."""


@dataclass(frozen=True, kw_only=True)
class PPOOptions(OnlineOptions):
    """The algorithm's own dials (Schulman et al. 2017; defaults as in TRL's PPO)."""

    num_epochs: int = 4
    """Passes over each rollout batch."""
    clip_eps: float = 0.2
    """The policy's ratio to itself at rollout time is clipped to 1 +- this."""
    gamma: float = 1.0
    """Discount of a reward one token later."""
    gae_lambda: float = 0.95
    """0 trusts the critic, 1 the sampled rewards (Schulman et al. 2016)."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and variance 1 over the whole rollout batch."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rewards: ScoreOptions = field(default_factory=ScoreOptions)

    def __post_init__(self):
        super().__post_init__()
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        check(
            0 < self.clip_eps < 1,
            f"clip_eps must be in (0, 1), got {self.clip_eps}: ratios are positive",
        )


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """One PPO run: a policy, prompts, and something that scores completions."""

    ppo: PPOOptions = field(default_factory=PPOOptions)

    @property
    def options(self) -> PPOOptions:
        """The algorithm's own."""
        return self.ppo
