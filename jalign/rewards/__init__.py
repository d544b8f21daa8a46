"""What a completion is worth: Python functions, reward checkpoints, and sums of them.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, and gives float32 [B]. Functions written for TRL work as they are (forms.py).
"""

from jalign.rewards.ensembles import combine
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
    Loaded,
    add_up,
    load_reward,
    load_term,
    load_terms,
    mean_of_judged,
    weighted_sum,
)
from jalign.rewards.terms import Ensemble, RewardTerm, parse_rewards
from jalign.rewards.verifiers import final_number, gsm8k, gsm8k_format

__all__ = [
    "Ensemble",
    "Loaded",
    "RewardFn",
    "RewardTerm",
    "Samples",
    "add_up",
    "checked",
    "combine",
    "each_reward",
    "final_number",
    "gsm8k",
    "gsm8k_format",
    "load_reward",
    "load_term",
    "load_terms",
    "mean_of_judged",
    "model_reward",
    "parse_rewards",
    "reward_of",
    "samples_of",
    "score_tokens",
    "weighted_sum",
]
