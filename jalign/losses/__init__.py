"""Losses and their parts: pure functions on plain arrays.

Arrays come in by position, scalars by keyword; what comes out is float32 and not
reduced. Reductions return (sum, count). Masks are True where a position counts.
"""

from jalign.losses.advantages import adaptive_kl_update, gae, kl_shaped_rewards
from jalign.losses.anchored import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from jalign.losses.aot import aot_loss, aot_unpaired_loss
from jalign.losses.bco import bco_loss, bco_shift_update
from jalign.losses.chunked import map_logits
from jalign.losses.divergence import (
    forward_kl_from_logits,
    jsd_from_logits,
    kl_from_logits,
)
from jalign.losses.divergences import (
    alpha_score,
    forward_kl_score,
    js_score,
    reverse_kl_score,
)
from jalign.losses.dpo import dpo_loss, implicit_rewards
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
from jalign.losses.kl import kl_k1, kl_k2, kl_k3
from jalign.losses.kto import kto_kl, kto_loss
from jalign.losses.logps import (
    average_logps,
    entropy_from_logits,
    logps_from_logits,
    sequence_logps,
    token_logps,
)
from jalign.losses.minillm import mean_returns_to_go, reverse_kl_rewards
from jalign.losses.online import nash_md_loss, xpo_loss
from jalign.losses.policy import apa_loss, cispo_loss, reinforce_loss, sapo_loss
from jalign.losses.ppo import approx_kl, clip_frac, ppo_policy_loss, ppo_value_loss
from jalign.losses.preference import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
)
from jalign.losses.ranking import pairwise_ranking_loss, plackett_luce_loss
from jalign.losses.reduce import (
    fixed_length_mean,
    masked_mean,
    masked_var,
    masked_whiten,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
)
from jalign.losses.reference import moving_reference
from jalign.losses.reference_free import (
    alphapo_loss,
    cpo_loss,
    orpo_loss,
    simpo_loss,
    tpo_loss,
)
from jalign.losses.reinforce import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    returns_to_go,
)
from jalign.losses.reward import (
    attribute_regression_loss,
    bradley_terry_loss,
    process_reward_loss,
    reward_center_loss,
)
from jalign.losses.rloo import rloo_loss
from jalign.losses.sequence_policy import (
    gmpo_loss,
    gspo_loss,
    gspo_token_loss,
    vespo_loss,
)
from jalign.losses.sft import cross_entropy, dft_loss, token_cross_entropy
from jalign.losses.token_divergence import token_forward_kl, token_jsd, token_kl
from jalign.losses.token_stats import (
    accuracy_from_logits,
    token_accuracy,
    token_entropy,
)
from jalign.losses.token_weights import (
    collision_entropy_from_logits,
    ld_weights,
    wpo_weights,
)

__all__ = [
    "accuracy_from_logits",
    "adaptive_kl_update",
    "alpha_score",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apa_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "approx_kl",
    "attribute_regression_loss",
    "average_logps",
    "bco_loss",
    "bco_pair_loss",
    "bco_shift_update",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_frac",
    "collision_entropy_from_logits",
    "cpo_loss",
    "cross_entropy",
    "dft_loss",
    "discopop_loss",
    "dpo_loss",
    "entropy_from_logits",
    "exo_pair_loss",
    "fixed_length_mean",
    "forward_kl_from_logits",
    "forward_kl_score",
    "gae",
    "gdpo_advantages",
    "gmpo_loss",
    "group_advantages",
    "gspo_loss",
    "gspo_token_loss",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "js_score",
    "jsd_from_logits",
    "kl_from_logits",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "kto_kl",
    "kto_loss",
    "ld_weights",
    "leave_one_out_advantages",
    "logps_from_logits",
    "map_logits",
    "masked_importance_weights",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "mean_returns_to_go",
    "moving_reference",
    "nash_md_loss",
    "nca_pair_loss",
    "off_policy_mask",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "process_reward_loss",
    "reinforce_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "returns_to_go",
    "reverse_kl_rewards",
    "reverse_kl_score",
    "reward_center_loss",
    "rloo_loss",
    "robust_dpo_loss",
    "sapo_loss",
    "sequence_logps",
    "sequence_masked_importance_weights",
    "sequence_mean",
    "sequence_sum_mean",
    "sequence_truncated_importance_weights",
    "simpo_loss",
    "sppo_hard_loss",
    "token_accuracy",
    "token_cross_entropy",
    "token_entropy",
    "token_forward_kl",
    "token_jsd",
    "token_kl",
    "token_logps",
    "token_mean",
    "tpo_loss",
    "truncated_importance_weights",
    "vespo_loss",
    "wpo_weights",
    "xpo_loss",
]
