"""Losses and their parts: pure functions on plain arrays.

Arrays come in by position, scalars by keyword; what comes out is float32 and not
reduced. Reductions return (sum, count). Masks are True where a position counts.
"""

from jalign.losses.advantages import (
    adaptive_kl_update,
    gae,
    kl_shaped_rewards,
)
from jalign.losses.chunked import map_logits
from jalign.losses.divergence import (
    forward_kl_from_logits,
    jsd_from_logits,
    kl_from_logits,
)
from jalign.losses.dpo import (
    dpo_loss,
    implicit_rewards,
)
from jalign.losses.group_advantages import (
    gdpo_advantages,
    group_advantages,
    leave_one_out_advantages,
)
from jalign.losses.importance import (
    masked_importance_weights,
    off_policy_mask,
    sequence_masked_importance_weights,
    sequence_truncated_importance_weights,
    truncated_importance_weights,
)
from jalign.losses.kl import (
    kl_k1,
    kl_k2,
    kl_k3,
)
from jalign.losses.logps import (
    entropy_from_logits,
    logps_from_logits,
    sequence_logps,
    token_logps,
)
from jalign.losses.minillm import (
    mean_returns_to_go,
    reverse_kl_rewards,
)
from jalign.losses.policy import (
    apa_loss,
    cispo_loss,
    reinforce_loss,
    sapo_loss,
)
from jalign.losses.ppo import (
    approx_kl,
    clip_frac,
    ppo_policy_loss,
    ppo_value_loss,
)
from jalign.losses.reduce import (
    fixed_length_mean,
    masked_mean,
    masked_var,
    masked_whiten,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
)
from jalign.losses.reinforce import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    returns_to_go,
)
from jalign.losses.reward import (
    bradley_terry_loss,
    reward_center_loss,
)
from jalign.losses.rloo import rloo_loss
from jalign.losses.sequence_policy import (
    gmpo_loss,
    gspo_loss,
    gspo_token_loss,
    vespo_loss,
)
from jalign.losses.sft import (
    cross_entropy,
    dft_loss,
    token_cross_entropy,
)
from jalign.losses.token_divergence import (
    token_forward_kl,
    token_jsd,
    token_kl,
)
from jalign.losses.token_stats import (
    accuracy_from_logits,
    token_accuracy,
    token_entropy,
)

__all__ = [
    "accuracy_from_logits",
    "adaptive_kl_update",
    "apa_loss",
    "approx_kl",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_frac",
    "cross_entropy",
    "dft_loss",
    "dpo_loss",
    "entropy_from_logits",
    "fixed_length_mean",
    "forward_kl_from_logits",
    "gae",
    "gdpo_advantages",
    "gmpo_loss",
    "group_advantages",
    "gspo_loss",
    "gspo_token_loss",
    "implicit_rewards",
    "jsd_from_logits",
    "kl_from_logits",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "leave_one_out_advantages",
    "logps_from_logits",
    "map_logits",
    "masked_importance_weights",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "mean_returns_to_go",
    "off_policy_mask",
    "ppo_policy_loss",
    "ppo_value_loss",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "returns_to_go",
    "reverse_kl_rewards",
    "reward_center_loss",
    "rloo_loss",
    "sapo_loss",
    "sequence_logps",
    "sequence_masked_importance_weights",
    "sequence_mean",
    "sequence_sum_mean",
    "sequence_truncated_importance_weights",
    "token_accuracy",
    "token_cross_entropy",
    "token_entropy",
    "token_forward_kl",
    "token_jsd",
    "token_kl",
    "token_logps",
    "token_mean",
    "truncated_importance_weights",
    "vespo_loss",
]
