"""Preference losses without a reference model: CPO, SimPO, AlphaPO, ORPO, TPO.

Only the part that compares completions; the usual negative log-likelihood of the
chosen one is a sum of losses (docs/papers.md).
"""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, elementwise
from jalign.losses.dpo import smoothed_logistic
from jalign.losses.scores import power_transform


@elementwise(rank=1)
def cpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """-(1-ε) log σ(z) - ε log σ(-z), z = β [log π(y_w) - log π(y_l)], one per pair.

    Reference-free DPO. CPO adds the NLL of the chosen completion.

    Args:
      chosen_logps, rejected_logps: float32 [B], nats, summed over completion tokens.
      beta: β > 0.
      label_smoothing: ε in [0, 0.5).

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Xu et al. 2024, eq. 3 (arXiv:2401.08417).
    """
    return smoothed_logistic(beta * (chosen_logps - rejected_logps), label_smoothing)


@elementwise(rank=1)
def simpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    beta: Scalar,
    gamma: Scalar = 0.5,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """-(1-ε) log σ(z) - ε log σ(-z), z = β [l_w - l_l] - γ, one per pair.

    Args:
      chosen_logps, rejected_logps: float32 [B], l, nats, *averaged* over completion
        tokens (`average_logps`).
      beta: β > 0; the paper uses 2 to 2.5, and 10 for some models.
      gamma: γ >= 0, target margin of the reward βl; not divided by β.
      label_smoothing: ε in [0, 0.5).

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Meng et al. 2024, eq. 6 (arXiv:2405.14734).
    """
    z = beta * (chosen_logps - rejected_logps) - gamma
    return smoothed_logistic(z, label_smoothing)


@elementwise(rank=1)
def alphapo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    beta: Scalar,
    alpha: Scalar,
    gamma: Scalar = 0.5,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """SimPO of the rewards (1 - p^-α)/α instead of log p, p = e^l, one per pair.

    Args:
      chosen_logps, rejected_logps: float32 [B], l, nats, *averaged* over completion
        tokens (`average_logps`).
      beta: β > 0.
      alpha: α, any number; 0 is SimPO. Positive values weigh unlikely completions up.
      gamma: γ >= 0, target margin.
      label_smoothing: ε in [0, 0.5).

    Returns: float32 [B], nats. Not reduced. -αl is held to at most 40; beyond it the
      gradient is 0.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Gupta et al. 2025 (arXiv:2501.03884).
    """
    chosen, rejected = (
        power_transform(x, -alpha) for x in (chosen_logps, rejected_logps)
    )
    return smoothed_logistic(beta * (chosen - rejected) - gamma, label_smoothing)


@elementwise(rank=1)
def orpo_loss(chosen_logps: Array, rejected_logps: Array) -> jax.Array:
    """-log σ(log odds(y_w) - log odds(y_l)), odds = p/(1-p), p = e^l, one per pair.

    ORPO is NLL of the chosen completion + λ times this, λ = 0.1.

    Args:
      chosen_logps, rejected_logps: float32 [B], l, nats, *averaged* over completion
        tokens (`average_logps`); above -1e-6 they count as -1e-6.

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Hong et al. 2024, eq. 7 (arXiv:2403.07691).
    """
    return -jax.nn.log_sigmoid(_log_odds(chosen_logps) - _log_odds(rejected_logps))


@elementwise(rank=1)
def tpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    gold_logps: Array,
    *,
    beta: Scalar,
    alpha: Scalar = 1.0,
    gamma: Scalar = 0.0,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """SimPO's loss of the pair - α log π(y_gold), one per triple.

    Args:
      chosen_logps, rejected_logps: float32 [B], nats; sums over completion tokens with
        γ = 0 (TPO), averages with γ > 0 (TPO-L).
      gold_logps: float32 [B], the same of the gold completion.
      beta: β > 0; 0.01 in TRL.
      alpha: α >= 0, weight of the gold completion.
      gamma: γ >= 0, target margin; 0.5 in TRL's TPO-L.
      label_smoothing: ε in [0, 0.5).

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless all three are float32 [B].
    Source: Saeidi et al. 2024 (arXiv:2405.16681).
    """
    z = beta * (chosen_logps - rejected_logps) - gamma
    return smoothed_logistic(z, label_smoothing) - alpha * gold_logps


def log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - e^x), x held to at most -1e-6, each half by the form that is exact."""
    x = jnp.minimum(x, -1e-6)  # so that neither half has an infinite gradient
    near, far = jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x))
    return jnp.where(x > -0.6931472, near, far)


def _log_odds(logp: jax.Array) -> jax.Array:
    """log p - log(1 - p)."""
    return logp - log1mexp(logp)
