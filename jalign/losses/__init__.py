"""Losses and their parts: pure functions on plain arrays.

Arrays come in by position, scalars by keyword; what comes out is float32 and not
reduced. Reductions return (sum, count). Masks are True where a position counts.
"""

from jalign.losses.advantages import adaptive_kl_update, gae, kl_shaped_rewards
from jalign.losses.chunked import map_logits
from jalign.losses.dpo import dpo_loss, implicit_rewards
from jalign.losses.kl import kl_k1, kl_k2, kl_k3
from jalign.losses.logps import (
    entropy_from_logits,
    logps_from_logits,
    sequence_logps,
    token_logps,
)
from jalign.losses.ppo import approx_kl, clip_frac, ppo_policy_loss, ppo_value_loss
from jalign.losses.reduce import (
    fixed_length_mean,
    masked_mean,
    masked_var,
    masked_whiten,
    sequence_mean,
    token_mean,
)
from jalign.losses.reward import bradley_terry_loss, reward_center_loss
from jalign.losses.sft import cross_entropy, token_cross_entropy

__all__ = [
    "adaptive_kl_update",
    "approx_kl",
    "bradley_terry_loss",
    "clip_frac",
    "cross_entropy",
    "dpo_loss",
    "entropy_from_logits",
    "fixed_length_mean",
    "gae",
    "implicit_rewards",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "logps_from_logits",
    "map_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reward_center_loss",
    "sequence_logps",
    "sequence_mean",
    "token_cross_entropy",
    "token_logps",
    "token_mean",
]
