"""Losses in which each completion's log-ratio has a target of its own.

Called as dpo_loss is, [B] to [B], with ρ = log π/π_ref of the chosen (w) and rejected
(l) completion. Unlike losses of the margin alone they see where the two lie: a margin
won by making both unlikely is not free.
"""

import jax
import jax.numpy as jnp

from jalign.losses.dpo import log_ratios
from jalign.losses.elementwise import Array, Scalar, elementwise


@elementwise(rank=1)
def nca_pair_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
) -> jax.Array:
    """-log σ(βρ_w) - ½ log σ(-βρ_w) - ½ log σ(-βρ_l), one per pair.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.

    Returns: float32 [B], nats; 2 log 2 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Chen et al. 2024, noise contrastive alignment (arXiv:2402.05369), K = 2.
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    noise = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * noise


@elementwise(rank=1)
def bco_pair_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
    shift: Scalar = 0.0,
) -> jax.Array:
    """-log σ(βρ_w - δ) - log σ(-(βρ_l - δ)), one per pair.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.
      shift: δ, the running mean of all rewards (`bco_shift_update`); no gradient
        flows. TRL's bco_pair has none.

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Jung et al. 2024 (arXiv:2404.04656).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    shift = jax.lax.stop_gradient(shift)
    good = -jax.nn.log_sigmoid(beta * chosen - shift)
    return good - jax.nn.log_sigmoid(shift - beta * rejected)


@elementwise(rank=1)
def sppo_hard_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
) -> jax.Array:
    """(ρ_w - 1/(2β))² + (ρ_l + 1/(2β))², one per pair.

    Self-play preference optimization where the chosen completion wins with
    probability 1 and the rejected one with 0.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None. π_ref is the last iteration's π.
      beta: β > 0, 1/η of the paper.

    Returns: float32 [B]; 1/(2β²) where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Wu et al. 2024, eq. 4.7 (arXiv:2405.00675).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


@elementwise(rank=1)
def apo_zero_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
) -> jax.Array:
    """[1 - σ(βρ_w)] + σ(βρ_l), one per pair: chosen up, rejected down.

    For data whose chosen completions are better than the model's own.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.

    Returns: float32 [B], between 0 and 2; 1 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@elementwise(rank=1)
def apo_down_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
) -> jax.Array:
    """σ(βρ_w) + [1 - σ(β(ρ_w - ρ_l))], one per pair: both down, rejected further.

    For data whose chosen completions are worse than the model's own.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.

    Returns: float32 [B], between 0 and 2; 1 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: D'Oosterlinck et al. 2024, eq. 8 (arXiv:2408.06266).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    lost = jax.nn.sigmoid(-beta * (chosen - rejected))
    return jax.nn.sigmoid(beta * chosen) + lost
