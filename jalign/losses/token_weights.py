"""Weights inside preference losses: of tokens by length, of pairs by on-policyness."""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, Scalar, check_float32, check_mask
from jalign.losses.logps import average_logps


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
