"""The divergences of `divergence.py` from two hidden states, never [B, T, V]."""

import functools

import chex
import jax
import jax.numpy as jnp

from jalign.losses.chunked import DEFAULT_CHUNK_SIZE, map_logits
from jalign.losses.divergence import (
    forward_kl_from_logits,
    jsd_from_logits,
    kl_from_logits,
)
from jalign.losses.elementwise import Array, Scalar
from jalign.losses.logps import cap_logits


def token_kl(
    hidden: Array,
    unembed: Array,
    ref_hidden: Array,
    ref_unembed: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> jax.Array:
    """`kl_from_logits(hidden @ unembed, ref_hidden @ ref_unembed)`, KL(π‖π_ref).

    Exact, over the whole vocabulary; as distillation the reverse KL.

    Args:
      hidden: any float dtype [B, T, D], of π (the student), after the final norm.
      unembed: any float dtype [D, V]; its gradient is accumulated in float32.
      ref_hidden: any float dtype [B, T, E], of π_ref (the teacher), which may be wider.
      ref_unembed: any float dtype [E, V]. No gradient flows to either.
      chunk_size: tokens per chunk, as in token_logps; a chunk holds both logits.
      temperature: > 0, divides both logits.
      softcap, ref_softcap: as in token_logps, of each model.

    Returns: float32 [B, T], nats, at least 0 up to rounding. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    Source: as kl_from_logits.
    """
    row_fn = functools.partial(_kl_row, softcap=softcap, ref_softcap=ref_softcap)
    return _map_both(
        row_fn,
        (hidden, unembed, ref_hidden, ref_unembed),
        {"temperature": temperature},
        chunk_size,
    )


def token_forward_kl(
    hidden: Array,
    unembed: Array,
    ref_hidden: Array,
    ref_unembed: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> jax.Array:
    """`forward_kl_from_logits(hidden @ unembed, ref_hidden @ ref_unembed)`, in chunks.

    Args:
      hidden, unembed, ref_hidden, ref_unembed: as in token_kl; the second pair is the
        teacher's.
      chunk_size, temperature, softcap, ref_softcap: as in token_kl.

    Returns: float32 [B, T], nats, at least 0 up to rounding. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    Source: as forward_kl_from_logits.
    """
    row_fn = functools.partial(
        _forward_kl_row, softcap=softcap, ref_softcap=ref_softcap
    )
    return _map_both(
        row_fn,
        (hidden, unembed, ref_hidden, ref_unembed),
        {"temperature": temperature},
        chunk_size,
    )


def token_jsd(
    hidden: Array,
    unembed: Array,
    ref_hidden: Array,
    ref_unembed: Array,
    *,
    beta: Scalar = 0.5,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    ref_softcap: float | None = None,
) -> jax.Array:
    """`jsd_from_logits(hidden @ unembed, ref_hidden @ ref_unembed)`, in chunks (GKD).

    Args:
      hidden, unembed, ref_hidden, ref_unembed: as in token_kl; the second pair is the
        teacher's.
      beta: β in [0, 1], 0 the forward and 1 the reverse KL.
      chunk_size, temperature, softcap, ref_softcap: as in token_kl.

    Returns: float32 [B, T], nats, at least 0 up to rounding. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    Source: as jsd_from_logits.
    """
    row_fn = functools.partial(_jsd_row, softcap=softcap, ref_softcap=ref_softcap)
    return _map_both(
        row_fn,
        (hidden, unembed, ref_hidden, ref_unembed),
        {"beta": beta, "temperature": temperature},
        chunk_size,
    )


def _map_both(row_fn, heads, scalars, chunk_size):
    hidden, unembed, ref_hidden, ref_unembed = heads
    chex.assert_rank([ref_hidden, ref_unembed], [3, 2])
    chex.assert_type([ref_hidden, ref_unembed], float)
    chex.assert_equal(ref_hidden.shape[2], ref_unembed.shape[0])
    chex.assert_equal_shape_suffix([unembed, ref_unembed], 1)
    scalars = {k: jnp.asarray(v, jnp.float32) for k, v in scalars.items()}
    ref_unembed = jnp.asarray(ref_unembed).astype(ref_hidden.dtype)
    consts = ref_unembed, scalars
    return map_logits(
        row_fn, hidden, unembed, ref_hidden, consts, chunk_size=chunk_size
    )


def _ref_logits(ref_hidden, ref_unembed, softcap):
    logits = jnp.einsum(
        "bsd,dv->bsv", ref_hidden, ref_unembed, preferred_element_type=jnp.float32
    )
    return cap_logits(logits, softcap)


def _row(function, logits, ref_hidden, consts, softcap, ref_softcap):
    ref_unembed, scalars = consts
    ref_logits = _ref_logits(ref_hidden, ref_unembed, ref_softcap)
    return function(cap_logits(logits, softcap), ref_logits, **scalars)


def _kl_row(*args, **caps):
    return _row(kl_from_logits, *args, **caps)


def _forward_kl_row(*args, **caps):
    return _row(forward_kl_from_logits, *args, **caps)


def _jsd_row(*args, **caps):
    return _row(jsd_from_logits, *args, **caps)
