"""Supervised fine-tuning: cross-entropy of each token."""

import functools

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, elementwise
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE, map_logits
from jalign.losses.logps import cap_logits, check_logits, target_logit


def cross_entropy(
    logits: Array,
    targets: Array,
    *,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
) -> jax.Array:
    """(1-ε)(-log p(target)) + ε mean_v(-log p(v)) + z_loss (log Z)².

    Args:
      logits: float32 [..., V].
      targets: int [...], in [0, V). One outside picks 0 for its logit: mask it.
      label_smoothing: ε in [0, 1), weight of the uniform distribution over V; needs
        finite logits.
      z_loss: weight that pulls log Z = logsumexp(logits) to 0; PaLM uses 1e-4.

    Returns: float32 [...], nats. Not reduced.
    Raises: AssertionError at trace time on another dtype or shape.
    Source: Szegedy et al. 2016, §7 (arXiv:1512.00567); z_loss: Chowdhery et al. 2022,
      §5 (arXiv:2204.02311).
    """
    check_logits(logits, targets)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    loss = log_z - target_logit(logits, targets)
    # Left out where off, and not multiplied by 0: 0 * inf is NaN.
    if not _is_off(label_smoothing):
        # Divided before the sum, which could overflow.
        uniform = jnp.sum((log_z[..., None] - logits) / logits.shape[-1], axis=-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if not _is_off(z_loss):
        loss = loss + z_loss * jnp.square(log_z)
    return loss


def token_cross_entropy(
    hidden: Array,
    unembed: Array,
    targets: Array,
    *,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    softcap: float | None = None,
) -> jax.Array:
    """`cross_entropy(hidden @ unembed, targets)` without ever holding [B, T, V].

    The caller shifts: hidden[:, :-1] with tokens[:, 1:].

    Args:
      hidden: any float dtype [B, T, D], after the final norm.
      unembed: any float dtype [D, V]; its gradient is accumulated in float32.
      targets: int [B, T], in [0, V). No gradient flows.
      label_smoothing, z_loss: as in cross_entropy.
      chunk_size, softcap: as in token_logps.

    Returns: float32 [B, T], nats. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    Source: as cross_entropy.
    """
    weights = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    weights = {k: jnp.asarray(v) for k, v in weights.items() if not _is_off(v)}
    row_fn = functools.partial(_row_loss, softcap=softcap)
    return map_logits(row_fn, hidden, unembed, targets, weights, chunk_size=chunk_size)


@elementwise(rank=2)
def dft_loss(logps: Array) -> jax.Array:
    """-sg[p] log p with p = exp(logps): cross-entropy that lets unlikely tokens be.

    Args:
      logps: float32 [B, T], nats, of the target tokens (token_logps).

    Returns: float32 [B, T], nats. Not reduced.
    Raises: AssertionError at trace time unless logps are float32 [B, T].
    Source: Wu et al. 2025, "On the Generalization of SFT" (DFT, arXiv:2508.05629).
    """
    # min: a log-probability is at most 0, and anything else must not overflow.
    probs = jnp.exp(jnp.minimum(jax.lax.stop_gradient(logps), 0.0))
    return -probs * logps


def _row_loss(logits, targets, weights, *, softcap):
    return cross_entropy(cap_logits(logits, softcap), targets, **weights)


def _is_off(weight: Scalar) -> bool:
    """Known to be 0 while tracing; a traced weight is not."""
    return isinstance(weight, (int, float)) and weight == 0
