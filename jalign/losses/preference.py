"""Losses of the margin between two log-ratios, besides DPO's own.

All are called as dpo_loss is, [B] to [B], and read
Δ = log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l). Without a reference (None) the first
two arrays may be any scores: log-probabilities, averages of them over the tokens, or an
f-divergence's scores.
"""

import jax
import jax.numpy as jnp

from jalign.losses.dpo import log_ratios, smoothed_logistic
from jalign.losses.elementwise import Array, Scalar, elementwise


@elementwise(rank=1)
def hinge_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
) -> jax.Array:
    """max(0, 1 - β Δ), one per pair: SLiC's calibration loss on log-ratios.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0; 1/β is the margin in nats.

    Returns: float32 [B]; 1 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Zhao et al. 2023 (arXiv:2305.10425); on log-ratios: Liu et al. 2023
      (arXiv:2309.06657).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


@elementwise(rank=1)
def ipo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
) -> jax.Array:
    """(Δ - 1/(2β))², one per pair: identity preference optimization.

    Of sums over the tokens as the paper writes it. TRL's `ipo`, which its authors call
    the one they ran, is this loss of `average_logps`.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0, the paper's τ.

    Returns: float32 [B]; 1/(4β²) where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return jnp.square(chosen - rejected - 0.5 / beta)


@elementwise(rank=1)
def robust_dpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> jax.Array:
    """[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε), one per pair.

    Over labels flipped with probability ε its mean is DPO's loss on the true ones.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.
      label_smoothing: ε in [0, 0.5), probability that a pair is labelled backwards.

    Returns: float32 [B], nats, of either sign; log 2 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    z, eps = beta * (chosen - rejected), label_smoothing
    flipped = eps * jax.nn.log_sigmoid(-z)
    return (flipped - (1 - eps) * jax.nn.log_sigmoid(z)) / (1 - 2 * eps)


@elementwise(rank=1)
def exo_pair_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 1e-3,
) -> jax.Array:
    """KL(q‖p) with q = (σ(βΔ), σ(-βΔ)) and p = (1-ε, ε), one per pair.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.
      label_smoothing: ε in (0, 0.5); 0 would make every loss infinite.

    Returns: float32 [B], nats, at least 0. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Ji et al. 2024, eq. 16 (arXiv:2402.00856).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    z, eps = beta * (chosen - rejected), jnp.asarray(label_smoothing, jnp.float32)
    won = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-eps))
    return won + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(eps))


@elementwise(rank=1)
def discopop_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
    *,
    beta: Scalar,
    tau: Scalar = 0.05,
) -> jax.Array:
    """(1-m) (-log σ(z)) + m exp(-z) with z = βΔ and m = σ(z/τ), one per pair.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss; references may both be None.
      beta: β > 0.
      tau: τ in (0, 1), temperature of the modulation m.

    Returns: float32 [B], ½ (1 + log 2) where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B].
    Source: Lu et al. 2024, eq. 5 (arXiv:2406.08414).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    z = beta * (chosen - rejected)
    # m exp(-z) under one exp: by themselves they are 0 * inf at very negative z.
    exponential = jnp.exp(jax.nn.log_sigmoid(z / tau) - z)
    return jax.nn.sigmoid(-z / tau) * smoothed_logistic(z, 0.0) + exponential
