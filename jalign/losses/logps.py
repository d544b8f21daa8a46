"""Log-probabilities of tokens, entropies, accuracies, from logits or hidden states."""

import functools
from typing import Literal, overload

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE, map_logits
from jalign.losses.layout import ONE_DEVICE, Layout


def logps_from_logits(logits: Array, targets: Array) -> jax.Array:
    """log p(target) = logits[target] - logsumexp(logits).

    Args:
      logits: float32 [..., V]; a column at -inf is a token that cannot be.
      targets: int [...], in [0, V). One outside picks 0 for its logit: mask it.

    Returns: float32 [...], nats, at most 0.
    Raises: AssertionError at trace time on another dtype or shape.
    """
    check_logits(logits, targets)
    return target_logit(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def entropy_from_logits(logits: Array) -> jax.Array:
    """Entropy of softmax(logits), -Σ p log p, where 0 log 0 = 0.

    Args:
      logits: float32 [..., V]; columns at -inf count nothing.

    Returns: float32 [...], nats, between 0 and log V.
    Raises: AssertionError at trace time unless logits are float32.
    """
    chex.assert_type(logits, jnp.float32)
    log_probs = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # exp(-200) is 0 in float32, and 0 * -200 is 0 where 0 * -inf would be NaN. Not by
    # `where`: XLA on a CPU writes out [..., V] for it, and is seven times slower.
    return -jnp.sum(jnp.exp(log_probs) * jnp.maximum(log_probs, -200.0), axis=-1)


@overload
def token_logps(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    mask: Array | None = ...,
    chunk_size: int = ...,
    temperature: Scalar = ...,
    softcap: float | None = ...,
    layout: Layout = ...,
    return_entropy: Literal[False] = ...,
) -> jax.Array: ...


@overload
def token_logps(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    mask: Array | None = ...,
    chunk_size: int = ...,
    temperature: Scalar = ...,
    softcap: float | None = ...,
    layout: Layout = ...,
    return_entropy: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def token_logps(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    mask: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    layout: Layout = ONE_DEVICE,
    return_entropy: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """log p(targets[b, t] | hidden[b, t]), without ever holding [B, T, V] logits.

    logits = softcap(hidden @ unembed) / temperature. The caller shifts: to score a row
    of tokens pass hidden[:, :-1] and tokens[:, 1:].

    Args:
      hidden: any float dtype [B, T, D], after the final norm. The product with unembed
        is taken in this dtype and accumulated in float32.
      unembed: any float dtype [D, V]; its gradient is accumulated in float32.
      targets: int [B, T], in [0, V). No gradient flows. One outside picks 0 for its
        logit: mask it.
      mask: bool [B, T], True where the result is wanted. Elsewhere it is 0 without a
        gradient, and the logits of prompts and padding are not computed, but for the
        rest of a chunk. None for everywhere.
      chunk_size: tokens whose logits exist at once, over the whole batch. On a mesh
        multiply by the number of devices over which the batch is split.
      temperature: > 0, divides the logits. No gradient flows.
      softcap: c > 0 replaces each logit z by c tanh(z / c), before the temperature.
      layout: of the logits on a mesh, as in map_logits.
      return_entropy: also return the entropy of each distribution.

    Returns: float32 [B, T], nats; with return_entropy also the entropies, the same.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    """
    row_fn = functools.partial(
        _logps_and_entropy, softcap=softcap, with_entropy=return_entropy
    )
    consts = jnp.asarray(temperature, jnp.float32)
    how = {"mask": mask, "chunk_size": chunk_size, "layout": layout}
    out = map_logits(row_fn, hidden, unembed, targets, consts, **how)
    return out if return_entropy else out[0]


def sequence_logps(logps: Array, mask: Array) -> jax.Array:
    """Sum of a completion's token log-probabilities.

    Args:
      logps: float32 [B, T], nats.
      mask: bool [B, T], True on the completion's tokens; the rest may hold anything.

    Returns: float32 [B], nats; 0 for a row with nothing counted.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    """
    check_float32([logps], rank=2)
    check_mask(mask, logps)
    return jnp.sum(jnp.where(mask, logps, 0.0), axis=-1)


def average_logps(logps: Array, mask: Array) -> jax.Array:
    """Mean of a completion's token log-probabilities.

    Losses with length normalisation take it for `sequence_logps`: SimPO, ORPO, TRL's
    ipo and sigmoid_norm.

    Args:
      logps: float32 [B, T], nats.
      mask: bool [B, T], True on the completion's tokens; the rest may hold anything.

    Returns: float32 [B], nats; 0 for a row with nothing counted.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    """
    total = sequence_logps(logps, mask)  # and checks both
    return total / jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.float32), 1.0)


def cap_logits(logits: jax.Array, softcap: float | None) -> jax.Array:
    """c tanh(z / c), or the logits as they are. Source: Gemma 2, arXiv:2408.00118."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def target_logit(logits: Array, targets: Array) -> jax.Array:
    """logits[..., targets], by comparison with iota.

    Not take_along_axis: a gather along a vocabulary split over devices would first
    collect all of it, and it gives NaN or wraps around for ids outside [0, V).
    """
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)


def check_logits(logits: Array, targets: Array) -> None:
    """Raises AssertionError unless logits are float32 [..., V], targets int [...]."""
    chex.assert_type(logits, jnp.float32)
    chex.assert_type(targets, int)
    chex.assert_shape(targets, logits.shape[:-1])


def _logps_and_entropy(logits, targets, temperature, *, softcap, with_entropy):
    logits = cap_logits(logits, softcap) / temperature
    logps = logps_from_logits(logits, targets)
    return (logps, entropy_from_logits(logits)) if with_entropy else (logps,)


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
