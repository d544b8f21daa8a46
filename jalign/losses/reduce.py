"""Masked statistics, and the reductions of unreduced losses to (sum, count).

A reduction returns its sum and what to divide it by apart, so that micro-batches and
devices can be added up before the one division. Entries that do not count may hold
anything, NaN too.
"""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask


def masked_mean(x: Array, mask: Array) -> jax.Array:
    """Mean of the counted entries; 0 if there is none.

    Args:
      x: float32, any shape.
      mask: bool, the same shape.

    Returns: float32 [].
    Raises: AssertionError at trace time on another shape or dtype.
    """
    total, count = token_mean(x, mask)
    return total / jnp.maximum(count, 1.0)


def masked_var(x: Array, mask: Array) -> jax.Array:
    """Unbiased variance (n - 1) of the counted entries; 0 for fewer than two.

    Args:
      x: float32, any shape.
      mask: bool, the same shape.

    Returns: float32 [].
    Raises: AssertionError at trace time on another shape or dtype.
    """
    mean = masked_mean(x, mask)
    total, count = token_mean(jnp.square(jnp.where(mask, x, mean) - mean), mask)
    return total / jnp.maximum(count - 1.0, 1.0)


def masked_whiten(x: Array, mask: Array, *, shift_mean: bool = True) -> jax.Array:
    """(x - mean) / sqrt(var + 1e-8) over the counted entries, then 0 elsewhere.

    Entries that all agree, up to rounding, become 0 rather than rounding noise over
    its own deviation. Statistics are over the whole array, whatever its sharding.

    Args:
      x: float32, any shape.
      mask: bool, the same shape.
      shift_mean: False leaves the mean where it was (rewards keep their sign).

    Returns: float32, the shape of x, 0 where not counted.
    Raises: AssertionError at trace time on another shape or dtype.
    Source: as TRL's `masked_whiten` (unbiased variance, 1e-8 inside the root).
    """
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    clean = jnp.where(mask, x, mean)
    noise = jnp.square(1e-6 * jnp.max(jnp.abs(clean), initial=0.0))
    scale = jnp.where(var > noise, jax.lax.rsqrt(var + 1e-8), 0.0)
    whitened = (clean - mean) * scale
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def token_mean(x: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
    """Each counted entry weighs the same (tokens [B, T], or pairs [B]).

    Args:
      x: float32, any shape.
      mask: bool, the same shape.

    Returns: (sum, number of counted entries), float32 [] each.
    Raises: AssertionError at trace time on another shape or dtype.
    Source: Yu et al. 2025, eq. 8 (arXiv:2503.14476) for policy losses.
    """
    chex.assert_type(x, jnp.float32)
    check_mask(mask, x)
    total = jnp.sum(jnp.where(mask, x, 0.0))
    return total, jnp.sum(mask, dtype=jnp.float32)


def sequence_mean(x: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
    """Each sequence weighs the same: the sum of the rows' means.

    Args:
      x: float32 [B, T].
      mask: bool [B, T].

    Returns: (sum of the means, number of rows with a counted token), float32 [] each.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Shao et al. 2024, eq. 3 (arXiv:2402.03300).
    """
    check_float32([x], rank=2)
    check_mask(mask, x)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    sums = jnp.sum(jnp.where(mask, x, 0.0), axis=1)
    means = sums / jnp.maximum(lengths, 1.0)
    return jnp.sum(means), jnp.sum(lengths > 0, dtype=jnp.float32)


def sequence_sum_mean(x: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
    """The mean over sequences of their sums: a sequence weighs as its length.

    Args:
      x: float32 [B, T].
      mask: bool [B, T].

    Returns: (sum, number of rows with a counted token), float32 [] each.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: "LUSPO" (arXiv:2602.05261), of gspo_loss; verl's seq-mean-token-sum.
    """
    check_float32([x], rank=2)
    total, _ = token_mean(x, mask)
    return total, jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)


def fixed_length_mean(
    x: Array, mask: Array, *, length: Scalar
) -> tuple[jax.Array, jax.Array]:
    """Each row is divided by one fixed length, however long it is.

    Args:
      x: float32 [B, T].
      mask: bool [B, T].
      length: > 0, usually the longest completion allowed.

    Returns: (sum, length * number of rows with a counted token), float32 [] each.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Liu et al. 2025, §3.2 "Dr. GRPO" (arXiv:2503.20783).
    """
    check_float32([x], rank=2)
    total, _ = token_mean(x, mask)
    rows = jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)
    return total, rows * length
