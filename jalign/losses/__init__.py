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
from jalign.losses.aot import (
    aot_loss,
    aot_unpaired_loss,
)
from jalign.losses.bco import (
    bco_loss,
    bco_shift_update,
)
from jalign.losses.chunked import map_logits
from jalign.losses.divergences import (
    alpha_score,
    forward_kl_score,
    js_score,
    reverse_kl_score,
)
from jalign.losses.dpo import dpo_loss, implicit_rewards
from jalign.losses.kl import kl_k1, kl_k2, kl_k3
from jalign.losses.kto import (
    kto_kl,
    kto_loss,
)
from jalign.losses.logps import (
    average_logps,
    entropy_from_logits,
    logps_from_logits,
    sequence_logps,
    token_logps,
)
from jalign.losses.online import (
    nash_md_loss,
    xpo_loss,
)
from jalign.losses.ppo import approx_kl, clip_frac, ppo_policy_loss, ppo_value_loss
from jalign.losses.preference import (
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
)
from jalign.losses.ranking import (
    pairwise_ranking_loss,
    plackett_luce_loss,
)
from jalign.losses.reduce import (
    fixed_length_mean,
    masked_mean,
    masked_var,
    masked_whiten,
    sequence_mean,
    token_mean,
)
from jalign.losses.reference import (
    moving_reference,
)
from jalign.losses.reference_free import (
    alphapo_loss,
    cpo_loss,
    orpo_loss,
    simpo_loss,
    tpo_loss,
)
from jalign.losses.reward import (
    attribute_regression_loss,
    bradley_terry_loss,
    process_reward_loss,
    reward_center_loss,
)
from jalign.losses.sft import cross_entropy, token_cross_entropy
from jalign.losses.token_weights import (
    collision_entropy_from_logits,
    ld_weights,
    wpo_weights,
)

__all__ = [
    "adaptive_kl_update",
    "alpha_score",
    "alphapo_loss",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "approx_kl",
    "attribute_regression_loss",
    "average_logps",
    "bco_loss",
    "bco_pair_loss",
    "bco_shift_update",
    "bradley_terry_loss",
    "clip_frac",
    "collision_entropy_from_logits",
    "cpo_loss",
    "cross_entropy",
    "discopop_loss",
    "dpo_loss",
    "entropy_from_logits",
    "exo_pair_loss",
    "fixed_length_mean",
    "forward_kl_score",
    "gae",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "js_score",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "kto_kl",
    "kto_loss",
    "ld_weights",
    "logps_from_logits",
    "map_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "moving_reference",
    "nash_md_loss",
    "nca_pair_loss",
    "orpo_loss",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "process_reward_loss",
    "reverse_kl_score",
    "reward_center_loss",
    "robust_dpo_loss",
    "sequence_logps",
    "sequence_mean",
    "simpo_loss",
    "sppo_hard_loss",
    "token_cross_entropy",
    "token_logps",
    "token_mean",
    "tpo_loss",
    "wpo_weights",
    "xpo_loss",
]
