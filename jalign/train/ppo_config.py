"""What a user picks for PPO: frozen dataclasses; a contradiction is an error here."""

from dataclasses import dataclass, field
from typing import Literal

from jalign.train.optim import OptimConfig


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
        _check(self.kl_coef >= 0, f"kl_coef must be >= 0, got {self.kl_coef}")
        _check(self.kl_horizon > 0, f"kl_horizon must be > 0, got {self.kl_horizon}")
        if self.kl_target is not None:
            _check(self.kl_target > 0, f"kl_target must be > 0, got {self.kl_target}")
            # The update multiplies the coefficient: from 0 it would never move.
            _check(self.kl_coef > 0, "kl_target needs kl_coef > 0 to start from")


@dataclass(frozen=True)
class ScoreOptions:
    """What happens to a sequence's reward before it is spread over tokens."""

    reward_clip: float | None = None
    """Clip each sequence's reward to [-reward_clip, reward_clip]."""
    missing_eos_penalty: float | None = None
    """Subtracted, after clipping, from a completion that never stopped by itself."""
    whiten_rewards: bool = False
    """Divide the token rewards by their standard deviation (their mean stays)."""

    def __post_init__(self):
        clip, penalty = self.reward_clip, self.missing_eos_penalty
        _check(clip is None or clip > 0, f"reward_clip must be > 0, got {clip}")
        _check(
            penalty is None or penalty > 0,
            f"missing_eos_penalty is subtracted and must be > 0, got {penalty}",
        )


@dataclass(frozen=True)
class SampleConfig:
    """How completions are sampled in a rollout."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    """Divides the logits of sampler, policy and reference alike."""
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a completion; empty means the tokenizer's end-of-sequence."""

    def __post_init__(self):
        _check(
            self.max_new_tokens > 0,
            f"max_new_tokens must be > 0, got {self.max_new_tokens}",
        )
        _check(
            self.temperature > 0,
            f"temperature must be > 0 for PPO, got {self.temperature}: "
            "greedy rollouts explore nothing",
        )
        _check(self.top_k >= 0, f"top_k must be >= 0, got {self.top_k}")
        _check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")


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
        _check(
            self.microbatches >= 1,
            f"microbatches must be >= 1, got {self.microbatches}",
        )


@dataclass(frozen=True)
class PPOOptions:
    """The algorithm's own dials (Schulman et al. 2017; defaults as in TRL's PPO)."""

    num_epochs: int = 4
    """Passes over each rollout batch."""
    num_minibatches: int = 1
    """Updates in each pass; must divide batch_size."""
    clip_eps: float = 0.2
    """The policy's ratio to itself at rollout time is clipped to 1 +- clip_eps."""
    value_clip_eps: float = 0.2
    """The critic may move this far from its values at rollout time."""
    gamma: float = 1.0
    """Discount of a reward one token later."""
    gae_lambda: float = 0.95
    """0 trusts the critic, 1 the sampled rewards (Schulman et al. 2016)."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and variance 1 over the whole rollout batch."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the policy's loss."""
    critic_learning_rate: float | None = None
    """The critic's peak learning rate; unset takes the policy's."""
    save_critic: bool = False
    """Also write OUT/critic, the value model, in HF format."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with prompts that cannot be read: stop, or count and leave out."""
    kl: KLConfig = field(default_factory=KLConfig)
    rewards: ScoreOptions = field(default_factory=ScoreOptions)
    sampling: SampleConfig = field(default_factory=SampleConfig)
    compute: ComputeOptions = field(default_factory=ComputeOptions)

    def __post_init__(self):
        for name in ("num_epochs", "num_minibatches"):
            value = getattr(self, name)
            _check(value >= 1, f"{name} must be >= 1, got {value}")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"{name} must be in [0, 1], got {value}")
        for name in ("clip_eps", "value_clip_eps"):
            value = getattr(self, name)
            _check(value > 0, f"{name} must be > 0, got {value}")
        _check(
            self.clip_eps < 1,
            f"clip_eps must be < 1, got {self.clip_eps}: ratios are positive",
        )


@dataclass(frozen=True)
class PPOConfig:
    """One PPO run: a policy, prompts, and something that scores completions."""

    model: str
    """Policy to align, and the frozen reference: a directory or a hub id."""
    data: str
    """Prompts: a hub id, a file (.jsonl, .json, .parquet) or a directory."""
    out: str
    """Directory for model/, checkpoints/, metrics.jsonl and report.html."""
    reward: str
    """`file.py:function`, or the directory or hub id of a reward model."""
    eval_data: str | None = None
    """Held-out prompts: reward and KL on them are measured before and after."""
    steps: int | None = None
    """Iterations, each a rollout batch and its updates; overrides epochs."""
    epochs: float = 1.0
    """Passes over the prompts, when steps is unset."""
    batch_size: int = 64
    """Prompts in a rollout batch, over all devices."""
    max_length: int = 512
    """Longest prompt with its completion, in tokens."""
    seed: int = 0
    mesh: str | None = None
    """Such as "fsdp=8,tensor=2"; unset puts all devices on fsdp."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; 0 saves only at the end."""
    resume: bool = True
    """Continue from the newest good checkpoint in OUT."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    ppo: PPOOptions = field(default_factory=PPOOptions)

    def __post_init__(self):
        pieces = self.ppo.num_minibatches * self.ppo.compute.microbatches
        _check(
            self.batch_size >= 1 and self.batch_size % pieces == 0,
            f"batch_size {self.batch_size} must be a multiple of num_minibatches x "
            f"microbatches = {pieces}",
        )
        new = self.ppo.sampling.max_new_tokens
        _check(
            self.max_length >= new + 2,
            f"max_length {self.max_length} leaves no room for a prompt before "
            f"max_new_tokens {new}",
        )
        _check(
            self.steps is None or self.steps >= 1,
            f"steps must be >= 1, got {self.steps}",
        )
        _check(self.epochs > 0, f"epochs must be > 0, got {self.epochs}")
        _check(
            self.checkpoint_every >= 0,
            f"checkpoint_every must be >= 0, got {self.checkpoint_every}",
        )


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
