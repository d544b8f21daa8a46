"""f-divergences in preference losses: what stands in for the log-ratio (f-DPO).

With another divergence than reverse KL between π and π_ref, the implicit reward is
β f'(π/π_ref) instead of β log π/π_ref. Each function here gives f'(u) of
log u = log π - log π_ref; a loss takes it as its score, without a reference:

    chosen, rejected = js_score(chosen_logps, ref_chosen_logps), js_score(...)
    dpo_loss(chosen, rejected, None, None, beta=0.1)
"""

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, Scalar, elementwise

MAX_EXPONENT = 40.0
"""Exponents are held to at most 40 before exp: the square of e⁴⁰ is still a float32."""


@elementwise(rank=1)
def reverse_kl_score(logps: Array, ref_logps: Array) -> jax.Array:
    """log u = log π - log π_ref: f(u) = u log u, KL(π‖π_ref), as in DPO.

    Args:
      logps: float32 [B], nats, summed over completion tokens.
      ref_logps: float32 [B], the same under π_ref; no gradient flows.

    Returns: float32 [B], nats.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Wang et al. 2023, table 1 (arXiv:2309.16240).
    """
    return _log_ratio(logps, ref_logps)


@elementwise(rank=1)
def forward_kl_score(logps: Array, ref_logps: Array) -> jax.Array:
    """1 - 1/u: f(u) = -log u, KL(π_ref‖π), moved by 1 so that it is 0 at u = 1.

    Args:
      logps, ref_logps: as in reverse_kl_score.

    Returns: float32 [B]. -log u is held to at most 40; beyond it the gradient is 0.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Wang et al. 2023, table 1 (arXiv:2309.16240).
    """
    return -capped_expm1(-_log_ratio(logps, ref_logps))


@elementwise(rank=1)
def js_score(logps: Array, ref_logps: Array) -> jax.Array:
    """log(2u / (1 + u)): the Jensen–Shannon divergence; at most log 2.

    Args:
      logps, ref_logps: as in reverse_kl_score.

    Returns: float32 [B], nats; 0 at u = 1.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Wang et al. 2023, table 1 (arXiv:2309.16240).
    """
    return jnp.log(2.0) + jax.nn.log_sigmoid(_log_ratio(logps, ref_logps))


@elementwise(rank=1)
def alpha_score(logps: Array, ref_logps: Array, *, alpha: Scalar = 0.5) -> jax.Array:
    """(u^(α-1) - 1) / (α - 1): the α-divergence; log u in the limit α = 1.

    α = 0 is forward_kl_score.

    Args:
      logps, ref_logps: as in reverse_kl_score.
      alpha: α, any number; within 1e-6 of 1 it is the limit.

    Returns: float32 [B]; 0 at u = 1. (α-1) log u is held to at most 40; beyond it the
      gradient is 0.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Wang et al. 2023, table 1 (arXiv:2309.16240), α of its f as in TRL:
      f'(u) = (u^(α-1) - 1) / (α - 1).
    """
    return power_transform(_log_ratio(logps, ref_logps), alpha - 1.0)


def power_transform(log_u: jax.Array, power: Scalar) -> jax.Array:
    """(u^p - 1) / p, log u at p = 0 (Box–Cox), from log u."""
    limit = jnp.abs(power) < 1e-6
    p = jnp.where(limit, 1.0, power)
    # Cleaned before exp too: the branch not taken must have a finite gradient.
    curved = capped_expm1(jnp.where(limit, 0.0, p * log_u)) / p
    return jnp.where(limit, log_u, curved)


def capped_expm1(x: jax.Array) -> jax.Array:
    """exp(min(x, 40)) - 1."""
    return jnp.expm1(jnp.minimum(x, MAX_EXPONENT))


def _log_ratio(logps: Array, ref_logps: Array) -> jax.Array:
    return logps - jax.lax.stop_gradient(ref_logps)
