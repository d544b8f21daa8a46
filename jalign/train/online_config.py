"""What a user picks for PPO and GRPO: what they share, then each one's own.

Frozen dataclasses; bounds stand beside the defaults. A contradiction raises ValueError
here, naming the fields; nothing is rewritten.
"""

import functools
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

from jalign.data.sources import Source
from jalign.rewards import parse_rewards
from jalign.rewards.sums import column_weights
from jalign.rewards.terms import Rewards
from jalign.settings import Checked, check, number
from jalign.train.config import RunConfig, parse_terms
from jalign.train.loss_spec import Term, option_names
from jalign.train.loss_table import Entry


@dataclass(frozen=True)
class ScoreLimits(Checked):
    """What happens to a completion's reward before it is learned from."""

    reward_clip: float | None = number(None, "> 0")
    """Largest size of a sequence's reward, up and down; what is beyond is clipped."""
    missing_eos_penalty: float | None = number(None, "> 0", why="it is subtracted")
    """Subtracted, after clipping, from a completion that never stopped by itself."""


@dataclass(frozen=True)
class SampleConfig(Checked):
    """How completions are sampled in a rollout."""

    max_new_tokens: int = number(64, "> 0")
    """Longest completion, in tokens."""
    temperature: float = number(1.0, "> 0", why="greedy rollouts explore nothing")
    """Divides the logits of sampler, policy and reference alike."""
    top_k: int = number(0, ">= 0")
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = number(1.0, "> 0", "<= 1")
    """Keep the smallest set of tokens with at least this probability."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a completion; empty means the tokenizer's end-of-sequence."""


@dataclass(frozen=True, kw_only=True)
class OnlineOptions(Checked):
    """How a rollout is made and how often it is learned from."""

    num_epochs: int = number(1, ">= 1")
    """Passes over each rollout batch."""
    num_minibatches: int = number(1, ">= 1")
    """Updates in each pass; must divide the completions of a rollout."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the policy's loss."""
    reward_timeout: float = 600.0
    """Seconds after which a call of a Python reward function counts as hanging."""
    sampling: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self):
        super().__post_init__()
        check_reward_timeout(self.reward_timeout)

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
    stop_kl: float | None = number(None, "> 0 nats")
    """Nats a completion from the reference: beyond it a rollout's updates stop, and two
    rollouts in a row beyond it end the run."""
    steps: int | None = number(None, ">= 1")
    """Iterations, each a rollout batch and its updates; overrides epochs."""
    epochs: float = number(1.0, "> 0")
    """Passes over the prompts, when steps is unset."""
    batch_size: int = number(64, ">= 1")
    """Prompts in a rollout batch, over all devices."""
    max_length: int = number(512, ">= 2")
    """Longest prompt with its completion, in tokens."""
    checkpoint_every: int = number(10, ">= 0")
    """Iterations between checkpoints; 0 saves only at the end."""

    def __post_init__(self):
        parse_rewards(self.reward)
        super().__post_init__()
        if self.eval_reward is not None:
            parse_rewards(self.eval_reward)
            check(
                self.holds_out,
                "eval_reward judges held-out prompts: set eval_data or eval_split, too",
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


@dataclass(frozen=True)
class KLConfig(Checked):
    """How the policy is held to the reference, inside the per-token reward."""

    kl_coef: float = number(0.05, ">= 0")
    """Reward lost per nat of log(policy/reference), at every token."""
    kl_target: float | None = number(None, "> 0")
    """Nats per sequence to hold by adapting kl_coef; unset keeps kl_coef fixed."""
    kl_horizon: int = number(10_000, "> 0")
    """Episodes over which the adaptive coefficient reacts (Ziegler et al. 2019)."""

    def __post_init__(self):
        super().__post_init__()
        # The update multiplies the coefficient: from 0 it would never move.
        check(
            self.kl_target is None or self.kl_coef > 0,
            "kl_target needs kl_coef > 0 to start from",
        )


@dataclass(frozen=True)
class CriticConfig(Checked):
    """What estimates the value of a state: a model of its own, or a head."""

    shared_trunk: bool = False
    """The critic is a second head of the policy: one pass and one update for both."""
    value_coef: float | None = number(None, "> 0")
    """With shared_trunk, weight of the value loss beside the policy's; unset is 0.1."""
    value_clip_eps: float = number(0.2, "> 0")
    """The critic may move this far from its values at rollout time."""
    critic_learning_rate: float | None = None
    """The critic's peak learning rate; unset takes the policy's."""
    save_critic: bool = False
    """Also write OUT/critic, the value model, in HF format."""

    def __post_init__(self):
        super().__post_init__()
        check(
            self.shared_trunk or self.value_coef is None,
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

    num_epochs: int = number(4, ">= 1")
    """Passes over each rollout batch."""
    clip_eps: float = number(0.2, "> 0", "< 1", why="ratios are positive")
    """The policy's ratio to itself at rollout time is clipped to 1 +- this."""
    gamma: float = number(1.0, ">= 0", "<= 1")
    """Discount of a reward one token later."""
    gae_lambda: float = number(0.95, ">= 0", "<= 1")
    """0 trusts the critic, 1 the sampled rewards (Schulman et al. 2016)."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and variance 1 over the whole rollout batch."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    rewards: ScoreOptions = field(default_factory=ScoreOptions)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """One PPO run: a policy, prompts, and something that scores completions."""

    ppo: PPOOptions = field(default_factory=PPOOptions)

    def __post_init__(self):
        super().__post_init__()
        check(
            not (self.ppo.critic.save_critic and self.lora.quantize),
            "save_critic writes a whole model, and quantize leaves none to merge into",
        )

    @property
    def options(self) -> PPOOptions:
        """The algorithm's own."""
        return self.ppo


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(OnlineOptions):
    """The algorithm's own dials (Shao et al. 2024; defaults as in TRL 1.16)."""

    group_size: int = number(
        8, ">= 2", why="a completion is compared with the others of its prompt"
    )
    """Completions of each prompt; a rollout has batch_size x group_size rows."""
    loss: str = "dapo"
    """A policy loss, as "gspo:clip_eps=1e-3", or a sum of several."""
    clip_eps: float | None = None
    """Bound of the ratio's fall; unset takes each loss's own, 0.2 for most."""
    clip_eps_high: float | None = None
    """Bound of its rise; unset takes gspo's and luspo's 4e-4, for others clip_eps."""
    beta: float = number(0.0, ">= 0")
    """Weight of the KL to the reference (k3) in the loss; 0 runs no reference."""
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    """Whose deviation divides reward - group mean; auto takes each loss's own way."""
    mask_truncated: bool = False
    """Train no token of a completion that did not stop within max_new_tokens."""
    rewards: ScoreLimits = field(default_factory=ScoreLimits)

    def __post_init__(self):
        super().__post_init__()
        terms, updates = self.terms(), self.updates_per_rollout
        for name, term in terms.items():
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
        low, high = self.clip_eps, self.clip_eps_high
        return parse_terms("grpo", self.loss, clip_eps=low, clip_eps_high=high)

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
