"""f-divergences in preference losses: what stands in for the log-ratio (f-DPO).

With another divergence than reverse KL between π and π_ref, the implicit reward is
β f'(π/π_ref) instead of β log π/π_ref. Each function here gives f'(u) of
log u = log π - log π_ref; a loss takes it as its score, without a reference:

    chosen, rejected = js_score(chosen_logps, ref_chosen_logps), js_score(...)
    dpo_loss(chosen, rejected, None, None, beta=0.1)

And weights inside preference losses: of tokens by length, of pairs by on-policyness.
"""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask, elementwise
from jalign.losses.logps import average_logps

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


def ld_weights(mask: Array, other_mask: Array, *, alpha: Scalar) -> jax.Array:
    """1 on the first min(|y|, |y'|) counted tokens, α on the rest: LD-DPO.

    `sequence_logps(ld_weights(mask, other_mask, alpha=α) * logps, mask)` is what a
    preference loss then takes, of π and of π_ref, of both completions.

    Args:
      mask: bool [B, T], True on the completion's tokens.
      other_mask: bool [B, T'], True on those of the completion it is paired with.
      alpha: α in [0, 1]; 1 is no change.

    Returns: float32 [B, T], 0 where not counted.
    Raises: AssertionError at trace time on wrong rank, batch or dtype.
    Source: Liu et al. 2024 (arXiv:2409.06411).
    """
    chex.assert_rank([mask, other_mask], 2)
    chex.assert_type([mask, other_mask], jnp.bool_)
    chex.assert_equal_shape_prefix([mask, other_mask], 1)
    position = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
    other_length = jnp.sum(other_mask, axis=1, dtype=jnp.int32, keepdims=True)
    weights = jnp.where(position <= other_length, 1.0, jnp.float32(alpha))
    return jnp.where(mask, weights, 0.0)


def wpo_weights(logps: Array, collision_entropy: Array, mask: Array) -> jax.Array:
    """exp(mean over tokens of [log p(y_t) + H₂(p_t)]): how much y is π's own.

    WPO multiplies the loss of a pair by the weights of both completions. H₂ aligns it:
    a token counts against what π's own samples would have, not against 1.

    Args:
      logps: float32 [B, T], nats, of the completion under π.
      collision_entropy: float32 [B, T], `collision_entropy_from_logits` of π.
      mask: bool [B, T], True on the completion's tokens; the rest may hold anything.

    Returns: float32 [B], > 0; 1 for a row with nothing counted. No gradient flows. The
      mean is held to ±40.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Zhou et al. 2024, eq. 2 (arXiv:2406.11827).
    """
    check_float32([logps, collision_entropy], rank=2)
    check_mask(mask, logps)
    mean = average_logps(logps + collision_entropy, mask)
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(mean, -40.0, 40.0)))


def collision_entropy_from_logits(logits: Array) -> jax.Array:
    """H₂ = -log Σ p², the Rényi entropy of order 2 of softmax(logits).

    A row function for `map_logits`, as `lambda logits, rows, consts: ...`.

    Args:
      logits: float32 [..., V]; columns at -inf count nothing.

    Returns: float32 [...], nats, between 0 and log V.
    Raises: AssertionError at trace time unless logits are float32.
    Source: Rényi 1961.
    """
    chex.assert_type(logits, jnp.float32)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jax.nn.logsumexp(2.0 * log_probs, axis=-1)
