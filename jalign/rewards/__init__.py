"""What a completion is worth: Python functions, reward checkpoints, and sums of them.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, and gives float32 [B]. Functions written for TRL work as they are
(samples.py).
"""

from jalign.rewards.functions import checked as checked
from jalign.rewards.samples import (
    RewardFn as RewardFn,
    Samples as Samples,
    each_reward as each_reward,
    reward_of as reward_of,
    samples_of as samples_of,
)
from jalign.rewards.scorer import (
    model_reward as model_reward,
    score_tokens as score_tokens,
)
from jalign.rewards.sums import (
    Loaded as Loaded,
    add_up as add_up,
    combine as combine,
    load_reward as load_reward,
    load_term as load_term,
    load_terms as load_terms,
    mean_of_judged as mean_of_judged,
    weighted_sum as weighted_sum,
)
from jalign.rewards.terms import (
    Ensemble as Ensemble,
    RewardTerm as RewardTerm,
    parse_rewards as parse_rewards,
)
from jalign.rewards.verifiers import (
    final_number as final_number,
    gsm8k as gsm8k,
    gsm8k_format as gsm8k_format,
)

__all__ = sorted(name for name, value in vars().items() if callable(value))  # pyright: ignore
