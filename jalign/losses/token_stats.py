"""Entropy and accuracy of each token from hidden states, never [B, T, V]."""

import functools

import jax
import jax.numpy as jnp

from jalign.losses.chunked import DEFAULT_CHUNK_SIZE, map_logits
from jalign.losses.elementwise import Array, Scalar
from jalign.losses.logps import (
    cap_logits,
    check_logits,
    entropy_from_logits,
)


def accuracy_from_logits(logits: Array, targets: Array) -> jax.Array:
    """1 where the target has the largest logit (the first of equals), else 0; a metric.

    Args:
      logits: float32 [..., V].
      targets: int [...], in [0, V).

    Returns: float32 [...], 0 or 1. No gradient flows.
    Raises: AssertionError at trace time on another dtype or shape.
    """
    check_logits(logits, targets)
    # By reductions and not argmax, which would collect a vocabulary split over devices.
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    logits = jax.lax.stop_gradient(jnp.asarray(logits))
    best = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(best, ids, logits.shape[-1]), axis=-1)
    return (first == targets).astype(jnp.float32)


def token_accuracy(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> jax.Array:
    """`accuracy_from_logits(hidden @ unembed, targets)` without [B, T, V]; a metric.

    Temperature and softcap do not change which logit is the largest.

    Args:
      hidden: any float dtype [B, T, D], after the final norm; the caller shifts.
      unembed: any float dtype [D, V].
      targets: int [B, T], in [0, V).
      chunk_size: as in token_logps.

    Returns: float32 [B, T], 0 or 1. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    """
    hidden, unembed = jax.lax.stop_gradient((hidden, unembed))
    return map_logits(_accuracy, hidden, unembed, targets, chunk_size=chunk_size)


def token_entropy(
    hidden: Array,
    unembed: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
) -> jax.Array:
    """`entropy_from_logits` of softcap(hidden @ unembed) / temperature, in chunks.

    The entropy bonus is `policy_loss - entropy_coef * token_entropy(...)`. Where
    log-probabilities are needed too, token_logps gives both at once.

    Args:
      hidden: any float dtype [B, T, D], after the final norm.
      unembed: any float dtype [D, V]; its gradient is accumulated in float32.
      chunk_size, temperature, softcap: as in token_logps.

    Returns: float32 [B, T], nats, between 0 and log V. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    Source: as a bonus Mnih et al. 2016, §4 (arXiv:1602.01783).
    """
    row_fn = functools.partial(_entropy, softcap=softcap)
    consts = jnp.asarray(temperature, jnp.float32)
    return map_logits(row_fn, hidden, unembed, (), consts, chunk_size=chunk_size)


def _accuracy(logits, targets, _):
    return accuracy_from_logits(logits, targets)


def _entropy(logits, _, temperature, *, softcap):
    return entropy_from_logits(cap_logits(logits, softcap) / temperature)
