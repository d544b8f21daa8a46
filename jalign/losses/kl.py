"""Estimators of KL(π‖π_ref) from tokens sampled from π (Schulman 2020)."""

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, elementwise

MAX_LOG_RATIO = 20.0
"""Log-ratios are held to ±20 before exp: e²⁰ is 5e8, and e⁸⁹ is no float32."""


def clamped_ratio(logps: Array, old_logps: Array) -> jax.Array:
    """exp(logps - old_logps), the difference held to ±20; no gradient to old_logps.

    Beyond ±20 the gradient is 0: a policy so far off is to be reported, not trained.
    """
    return jnp.exp(hold(logps - jax.lax.stop_gradient(old_logps)))


@elementwise(rank=2)
def kl_k1(logps: Array, ref_logps: Array) -> jax.Array:
    """log π - log π_ref: unbiased, of either sign. For rewards, not as a loss.

    Args:
      logps: float32 [B, T], nats, of tokens sampled from π.
      ref_logps: float32 [B, T], the same under π_ref; no gradient flows.

    Returns: float32 [B, T], nats. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return logps - jax.lax.stop_gradient(ref_logps)


@elementwise(rank=2)
def kl_k2(logps: Array, ref_logps: Array) -> jax.Array:
    """½ (log π - log π_ref)²: biased, but its gradient is that of the KL.

    Args:
      logps, ref_logps: as in kl_k1.

    Returns: float32 [B, T], nats, at least 0. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return 0.5 * jnp.square(logps - jax.lax.stop_gradient(ref_logps))


@elementwise(rank=2)
def kl_k3(logps: Array, ref_logps: Array) -> jax.Array:
    """e^d - 1 - d with d = log π_ref - log π, held to ±20: unbiased, at least 0.

    Args:
      logps, ref_logps: as in kl_k1.

    Returns: float32 [B, T], nats, at least 0. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    # Held before the exp: after it the gradient would be 0 * inf = NaN.
    d = hold(jax.lax.stop_gradient(ref_logps) - logps)
    return jnp.expm1(d) - d


def hold(log_ratio: jax.Array) -> jax.Array:
    """The log-ratio held to ±20, with gradient 0 beyond."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
