"""What a user picks for any online run: frozen dataclasses that PPO and GRPO share.

A contradiction raises ValueError here, naming the fields; nothing is rewritten.
"""

import threading
from dataclasses import dataclass, field

from jalign.data.sources import Source
from jalign.rewards import parse_rewards
from jalign.rewards.sums import column_weights
from jalign.rewards.terms import Rewards
from jalign.train.run_config import RunConfig, check


@dataclass(frozen=True)
class ScoreLimits:
    """What happens to a completion's reward before it is learned from."""

    reward_clip: float | None = None
    """Largest size of a sequence's reward, up and down; what is beyond is clipped."""
    missing_eos_penalty: float | None = None
    """Subtracted, after clipping, from a completion that never stopped by itself."""

    def __post_init__(self):
        clip, penalty = self.reward_clip, self.missing_eos_penalty
        check(clip is None or clip > 0, f"reward_clip must be > 0, got {clip}")
        check(
            penalty is None or penalty > 0,
            f"missing_eos_penalty is subtracted and must be > 0, got {penalty}",
        )


@dataclass(frozen=True)
class SampleConfig:
    """How completions are sampled in a rollout."""

    max_new_tokens: int = 64
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Divides the logits of sampler, policy and reference alike."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a completion; empty means the tokenizer's end-of-sequence."""

    def __post_init__(self):
        check(
            self.max_new_tokens > 0,
            f"max_new_tokens must be > 0, got {self.max_new_tokens}",
        )
        check(
            self.temperature > 0,
            f"temperature must be > 0, got {self.temperature}: "
            "greedy rollouts explore nothing",
        )
        check(self.top_k >= 0, f"top_k must be >= 0, got {self.top_k}")
        check(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """How a rollout is made and how often it is learned from."""

    num_epochs: int = 1
    """Passes over each rollout batch."""
    num_minibatches: int = 1
    """Updates in each pass; must divide the completions of a rollout."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the policy's loss."""
    reward_timeout: float = 600.0
    """Seconds after which a call of a Python reward function counts as hanging."""
    sampling: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        check_reward_timeout(self.reward_timeout)
        for name in ("num_epochs", "num_minibatches"):
            value = getattr(self, name)
            check(value >= 1, f"{name} must be >= 1, got {value}")

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on each rollout batch."""
        return self.num_epochs * self.num_minibatches


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(RunConfig):
    """The fields that all online runs share; a subclass adds its algorithm's own."""

    model: str
    """Policy to align, and the frozen reference: a directory or a hub id."""
    data: Source
    """Prompts: a file, a directory or a hub id; "SOURCE[NAME]" names a split of it."""
    reward: Rewards
    """`file.py:function`, a reward model, a check (gsm8k), an ensemble such as "min(A,
    B)" or "mean(A, B) - 0.5*std", or a sum with weights."""
    eval_reward: Rewards | None = None
    """As reward, and never trained on: judges the held-out completions beside it."""
    stop_kl: float | None = None
    """Nats a completion from the reference: beyond it a rollout's updates stop, and two
    rollouts in a row beyond it end the run."""
    steps: int | None = None
    """Iterations, each a rollout batch and its updates; overrides epochs."""
    epochs: float = 1.0
    """Passes over the prompts, when steps is unset."""
    batch_size: int = 64
    """Prompts in a rollout batch, over all devices."""
    max_length: int = 512
    """Longest prompt with its completion, in tokens."""
    checkpoint_every: int = 10
    """Iterations between checkpoints; 0 saves only at the end."""

    def __post_init__(self):
        parse_rewards(self.reward)
        super().__post_init__()
        if self.eval_reward is not None:
            parse_rewards(self.eval_reward)
            check(
                self.eval_data is not None or self.eval_split is not None,
                "eval_reward judges held-out prompts: set eval_data or eval_split, too",
            )
        check(
            self.stop_kl is None or self.stop_kl > 0,
            f"stop_kl must be > 0 nats, got {self.stop_kl}",
        )
        pieces = self.options.num_minibatches * self.compute.microbatches
        size = f"batch_size {self.batch_size}"
        if self.group_size > 1:
            size += f" x group_size {self.group_size} = {self.completions}"
        check(
            self.completions % pieces == 0,
            f"{size} must be a multiple of num_minibatches x microbatches = {pieces}",
        )
        new = self.options.sampling.max_new_tokens
        check(
            self.max_length >= new + 2,
            f"max_length {self.max_length} leaves no room for a prompt before "
            f"max_new_tokens {new}",
        )

    @property
    def figures(self) -> tuple[str, ...]:
        """What keep_best may name; a reward that is not trained on comes first."""
        names = column_weights(parse_rewards(self.reward))
        parts = [f"rewards/{name}" for name in names] if len(names) > 1 else []
        gold = ["gold_reward"] if self.eval_reward else []
        return *gold, "reward", *parts, "stopped"

    @property
    def options(self) -> OnlineOptions:
        """The algorithm's own."""
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """Completions of each prompt in a rollout."""
        return 1

    @property
    def completions(self) -> int:
        """Rows of a rollout batch, over all devices."""
        return self.batch_size * self.group_size

    @property
    def has_reference(self) -> bool:
        """Whether the loss or the rewards need the frozen reference."""
        return True


def check_reward_timeout(seconds: float) -> None:
    """Raises ValueError unless a thread can be waited for so long."""
    ok = 0 < seconds <= threading.TIMEOUT_MAX
    check(ok, f"reward_timeout must be > 0 seconds, got {seconds}")
