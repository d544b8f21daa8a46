"""What a completion is worth: Python functions, reward checkpoints, and sums of them.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, and gives float32 [B].
"""

from jalign.rewards.functions import RewardFn, checked, load_reward
from jalign.rewards.scorer import model_reward, score_tokens
from jalign.rewards.sums import (
    Judge,
    RewardTerm,
    load_term,
    load_terms,
    parse_rewards,
    weighted_sum,
)
from jalign.rewards.verifiers import final_number, gsm8k, gsm8k_format

__all__ = [
    "Judge",
    "RewardFn",
    "RewardTerm",
    "checked",
    "final_number",
    "gsm8k",
    "gsm8k_format",
    "load_reward",
    "load_term",
    "load_terms",
    "model_reward",
    "parse_rewards",
    "score_tokens",
    "weighted_sum",
]
