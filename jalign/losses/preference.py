"""Preference losses of two completions' log-ratios, besides DPO's own.

Each formula is of ρ_w and ρ_l, log π/π_ref of the chosen and the rejected completion,
most of Δ = ρ_w - ρ_l alone; `paired` makes it a loss that is called as dpo_loss is, [B]
to [B]. Those that see ρ_w and ρ_l apart do not let a margin be won by making both
unlikely.

XPO is beside them; online DPO needs no loss of its own: it is dpo_loss of two samples
of π that a judge has ranked (docs/papers.md).
"""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, elementwise
from jalign.losses.dpo import log_ratios, paired, smoothed_logistic


@paired
def hinge_loss(chosen: Array, rejected: Array, *, beta: Scalar) -> jax.Array:
    """max(0, 1 - β Δ), one per pair: SLiC's calibration loss on log-ratios.

    Args:
      beta: β > 0; 1/β is the margin in nats.

    Returns: float32 [B]; 1 where π = π_ref. Not reduced.
    Source: Zhao et al. 2023 (arXiv:2305.10425); on log-ratios: Liu et al. 2023
      (arXiv:2309.06657).
    """
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


@paired
def ipo_loss(chosen: Array, rejected: Array, *, beta: Scalar) -> jax.Array:
    """(Δ - 1/(2β))², one per pair: identity preference optimization.

    Of sums over the tokens as the paper writes it. TRL's `ipo`, which its authors call
    the one they ran, is this loss of `average_logps`.

    Args:
      beta: β > 0, the paper's τ.

    Returns: float32 [B]; 1/(4β²) where π = π_ref. Not reduced.
    Source: Azar et al. 2023, eq. 17 (arXiv:2310.12036).
    """
    return jnp.square(chosen - rejected - 0.5 / beta)


@paired
def robust_dpo_loss(
    chosen: Array, rejected: Array, *, beta: Scalar, label_smoothing: Scalar
) -> jax.Array:
    """[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1 - 2ε), one per pair.

    Over labels flipped with probability ε its mean is DPO's loss on the true ones.

    Args:
      beta: β > 0.
      label_smoothing: ε in [0, 0.5), probability that a pair is labelled backwards.

    Returns: float32 [B], nats, of either sign; log 2 where π = π_ref. Not reduced.
    Source: Chowdhury et al. 2024 (arXiv:2403.00409).
    """
    z, eps = beta * (chosen - rejected), label_smoothing
    flipped = eps * jax.nn.log_sigmoid(-z)
    return (flipped - (1 - eps) * jax.nn.log_sigmoid(z)) / (1 - 2 * eps)


@paired
def exo_pair_loss(
    chosen: Array, rejected: Array, *, beta: Scalar, label_smoothing: Scalar = 1e-3
) -> jax.Array:
    """KL(q‖p) with q = (σ(βΔ), σ(-βΔ)) and p = (1-ε, ε), one per pair.

    Args:
      beta: β > 0.
      label_smoothing: ε in (0, 0.5); 0 would make every loss infinite.

    Returns: float32 [B], nats, at least 0. Not reduced.
    Source: Ji et al. 2024, eq. 16 (arXiv:2402.00856).
    """
    z, eps = beta * (chosen - rejected), jnp.asarray(label_smoothing, jnp.float32)
    won = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log1p(-eps))
    return won + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - jnp.log(eps))


@paired
def discopop_loss(
    chosen: Array, rejected: Array, *, beta: Scalar, tau: Scalar = 0.05
) -> jax.Array:
    """(1-m) (-log σ(z)) + m exp(-z) with z = βΔ and m = σ(z/τ), one per pair.

    Args:
      beta: β > 0.
      tau: τ in (0, 1), temperature of the modulation m.

    Returns: float32 [B], ½ (1 + log 2) where π = π_ref. Not reduced.
    Source: Lu et al. 2024, eq. 5 (arXiv:2406.08414).
    """
    z = beta * (chosen - rejected)
    # m exp(-z) under one exp: by themselves they are 0 * inf at very negative z.
    exponential = jnp.exp(jax.nn.log_sigmoid(z / tau) - z)
    return jax.nn.sigmoid(-z / tau) * smoothed_logistic(z, 0.0) + exponential


@paired
def nca_pair_loss(chosen: Array, rejected: Array, *, beta: Scalar) -> jax.Array:
    """-log σ(βρ_w) - ½ log σ(-βρ_w) - ½ log σ(-βρ_l), one per pair.

    Args:
      beta: β > 0.

    Returns: float32 [B], nats; 2 log 2 where π = π_ref. Not reduced.
    Source: Chen et al. 2024, noise contrastive alignment (arXiv:2402.05369), K = 2.
    """
    noise = jax.nn.log_sigmoid(-beta * chosen) + jax.nn.log_sigmoid(-beta * rejected)
    return -jax.nn.log_sigmoid(beta * chosen) - 0.5 * noise


@paired
def bco_pair_loss(
    chosen: Array, rejected: Array, *, beta: Scalar, shift: Scalar = 0.0
) -> jax.Array:
    """-log σ(βρ_w - δ) - log σ(-(βρ_l - δ)), one per pair.

    Args:
      beta: β > 0.
      shift: δ, the running mean of all rewards (`bco_shift_update`); no gradient
        flows. TRL's bco_pair has none.

    Returns: float32 [B], nats. Not reduced.
    Source: Jung et al. 2024 (arXiv:2404.04656).
    """
    shift = jax.lax.stop_gradient(shift)
    good = -jax.nn.log_sigmoid(beta * chosen - shift)
    return good - jax.nn.log_sigmoid(shift - beta * rejected)


@paired
def sppo_hard_loss(chosen: Array, rejected: Array, *, beta: Scalar) -> jax.Array:
    """(ρ_w - 1/(2β))² + (ρ_l + 1/(2β))², one per pair.

    Self-play preference optimization where the chosen completion wins with
    probability 1 and the rejected one with 0; π_ref is the last iteration's π.

    Args:
      beta: β > 0, 1/η of the paper.

    Returns: float32 [B]; 1/(2β²) where π = π_ref. Not reduced.
    Source: Wu et al. 2024, eq. 4.7 (arXiv:2405.00675).
    """
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


@paired
def dpop_loss(
    chosen: Array, rejected: Array, *, beta: Scalar, penalty: Scalar = 50.0
) -> jax.Array:
    """-log σ(β [Δ - λ max(0, -ρ_w)]), one per pair: DPO-positive.

    DPO, but a chosen completion that became less likely than under π_ref is paid for.

    Args:
      beta: β > 0.
      penalty: λ >= 0, of each nat that the chosen completion lost; 0 is DPO.

    Returns: float32 [B], nats; log 2 where π = π_ref. Not reduced.
    Source: Pal et al. 2024, Smaug (arXiv:2402.13228); λ = 50 is theirs.
    """
    lost = jax.nn.relu(-chosen)
    return smoothed_logistic(beta * (chosen - rejected - penalty * lost), 0.0)


@paired
def apo_zero_loss(chosen: Array, rejected: Array, *, beta: Scalar) -> jax.Array:
    """[1 - σ(βρ_w)] + σ(βρ_l), one per pair: chosen up, rejected down.

    For data whose chosen completions are better than the model's own.

    Args:
      beta: β > 0.

    Returns: float32 [B], between 0 and 2; 1 where π = π_ref. Not reduced.
    Source: D'Oosterlinck et al. 2024, eq. 7 (arXiv:2408.06266).
    """
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@paired
def apo_down_loss(chosen: Array, rejected: Array, *, beta: Scalar) -> jax.Array:
    """σ(βρ_w) + [1 - σ(β(ρ_w - ρ_l))], one per pair: both down, rejected further.

    For data whose chosen completions are worse than the model's own.

    Args:
      beta: β > 0.

    Returns: float32 [B], between 0 and 2; 1 where π = π_ref. Not reduced.
    Source: D'Oosterlinck et al. 2024, eq. 8 (arXiv:2408.06266).
    """
    lost = jax.nn.sigmoid(-beta * (chosen - rejected))
    return jax.nn.sigmoid(beta * chosen) + lost


@elementwise(rank=1)
def xpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    explore_logps: Array,
    *,
    beta: Scalar,
    alpha: Scalar = 1e-5,
) -> jax.Array:
    """dpo_loss + α log π(ỹ), one per prompt: optimism by unlearning the reference.

    Of the two ranked completions one is a sample of π, the other one ỹ, of π_ref.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss.
      explore_logps: float32 [B], log π(ỹ|x) in nats of the sample of π_ref: whichever
        of the first two arrays it is in.
      beta: β > 0.
      alpha: α >= 0, weight of the exploration; 0 is online DPO.

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless all five are float32 [B].
    Source: Xie et al. 2024, algorithm 1 (arXiv:2405.21046).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = smoothed_logistic(beta * (chosen - rejected), 0.0)
    return loss + alpha * explore_logps
