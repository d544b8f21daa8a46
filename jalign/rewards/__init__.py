"""What a completion is worth: Python functions, reward checkpoints, and sums of them.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, and gives float32 [B].
"""

from jalign.rewards.functions import checked
from jalign.rewards.samples import (
    RewardFn,
    Samples,
    each_reward,
    reward_of,
    samples_of,
)
from jalign.rewards.scorer import model_reward, score_tokens
from jalign.rewards.sums import (
    RewardTerm,
    load_reward,
    load_term,
    load_terms,
    parse_rewards,
    weighted_sum,
)
from jalign.rewards.verifiers import final_number, gsm8k, gsm8k_format

__all__ = [
    "RewardFn",
    "RewardTerm",
    "Samples",
    "checked",
    "each_reward",
    "final_number",
    "gsm8k",
    "gsm8k_format",
    "load_reward",
    "load_term",
    "load_terms",
    "model_reward",
    "parse_rewards",
    "reward_of",
    "samples_of",
    "score_tokens",
    "weighted_sum",
]
