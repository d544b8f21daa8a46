"""Losses and their parts: pure functions on plain arrays.

Arrays come in by position, scalars by keyword; what comes out is float32 and not
reduced. Reductions return (sum, count). Masks are True where a position counts.
"""

from jalign.losses.advantages import (
    adaptive_kl_update as adaptive_kl_update,
    gae as gae,
    kl_shaped_rewards as kl_shaped_rewards,
    reinforce_plus_plus_advantages as reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages as reinforce_plus_plus_baseline_advantages,
    remax_advantages as remax_advantages,
    returns_to_go as returns_to_go,
)
from jalign.losses.aot import (
    aot_loss as aot_loss,
    aot_unpaired_loss as aot_unpaired_loss,
)
from jalign.losses.chunked import map_logits as map_logits
from jalign.losses.distillation import (
    forward_kl_from_logits as forward_kl_from_logits,
    jsd_from_logits as jsd_from_logits,
    kl_from_logits as kl_from_logits,
    mean_returns_to_go as mean_returns_to_go,
    reverse_kl_rewards as reverse_kl_rewards,
    token_forward_kl as token_forward_kl,
    token_jsd as token_jsd,
    token_kl as token_kl,
)
from jalign.losses.dpo import (
    dpo_loss as dpo_loss,
    implicit_rewards as implicit_rewards,
    moving_reference as moving_reference,
)
from jalign.losses.group_advantages import (
    gdpo_advantages as gdpo_advantages,
    group_advantages as group_advantages,
    leave_one_out_advantages as leave_one_out_advantages,
    optimal_baseline_advantages as optimal_baseline_advantages,
)
from jalign.losses.kto import (
    bco_loss as bco_loss,
    bco_shift_update as bco_shift_update,
    kto_kl as kto_kl,
    kto_loss as kto_loss,
)
from jalign.losses.logps import (
    accuracy_from_logits as accuracy_from_logits,
    average_logps as average_logps,
    entropy_from_logits as entropy_from_logits,
    logps_from_logits as logps_from_logits,
    sequence_logps as sequence_logps,
    token_accuracy as token_accuracy,
    token_entropy as token_entropy,
    token_logps as token_logps,
)
from jalign.losses.policy import (
    apa_loss as apa_loss,
    cispo_loss as cispo_loss,
    nash_md_loss as nash_md_loss,
    reinforce_loss as reinforce_loss,
    rloo_loss as rloo_loss,
    sapo_loss as sapo_loss,
)
from jalign.losses.ppo import (
    approx_kl as approx_kl,
    clip_frac as clip_frac,
    ppo_policy_loss as ppo_policy_loss,
    ppo_value_loss as ppo_value_loss,
)
from jalign.losses.preference import (
    apo_down_loss as apo_down_loss,
    apo_zero_loss as apo_zero_loss,
    bco_pair_loss as bco_pair_loss,
    discopop_loss as discopop_loss,
    dpop_loss as dpop_loss,
    exo_pair_loss as exo_pair_loss,
    hinge_loss as hinge_loss,
    ipo_loss as ipo_loss,
    nca_pair_loss as nca_pair_loss,
    robust_dpo_loss as robust_dpo_loss,
    sppo_hard_loss as sppo_hard_loss,
    xpo_loss as xpo_loss,
)
from jalign.losses.ratios import (
    kl_k1 as kl_k1,
    kl_k2 as kl_k2,
    kl_k3 as kl_k3,
    masked_importance_weights as masked_importance_weights,
    off_policy_mask as off_policy_mask,
    sequence_masked_importance_weights as sequence_masked_importance_weights,
    sequence_truncated_importance_weights as sequence_truncated_importance_weights,
    truncated_importance_weights as truncated_importance_weights,
)
from jalign.losses.reduce import (
    fixed_length_mean as fixed_length_mean,
    masked_mean as masked_mean,
    masked_var as masked_var,
    masked_whiten as masked_whiten,
    sequence_mean as sequence_mean,
    sequence_sum_mean as sequence_sum_mean,
    token_mean as token_mean,
)
from jalign.losses.reference_free import (
    alphapo_loss as alphapo_loss,
    cpo_loss as cpo_loss,
    orpo_loss as orpo_loss,
    simpo_loss as simpo_loss,
    tpo_loss as tpo_loss,
)
from jalign.losses.reward import (
    attribute_regression_loss as attribute_regression_loss,
    bradley_terry_loss as bradley_terry_loss,
    pairwise_ranking_loss as pairwise_ranking_loss,
    plackett_luce_loss as plackett_luce_loss,
    process_reward_loss as process_reward_loss,
    reward_center_loss as reward_center_loss,
)
from jalign.losses.router import load_balancing_loss as load_balancing_loss
from jalign.losses.scores import (
    alpha_score as alpha_score,
    collision_entropy_from_logits as collision_entropy_from_logits,
    forward_kl_score as forward_kl_score,
    js_score as js_score,
    ld_weights as ld_weights,
    reverse_kl_score as reverse_kl_score,
    wpo_weights as wpo_weights,
)
from jalign.losses.sequence_policy import (
    gmpo_loss as gmpo_loss,
    gspo_loss as gspo_loss,
    gspo_token_loss as gspo_token_loss,
    vespo_loss as vespo_loss,
)
from jalign.losses.sft import (
    cross_entropy as cross_entropy,
    dft_loss as dft_loss,
    token_cross_entropy as token_cross_entropy,
)

__all__ = sorted(name for name, value in vars().items() if callable(value))  # pyright: ignore
