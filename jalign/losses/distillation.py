"""Exact divergences of two distributions over the vocabulary, and MiniLLM's rewards.

Of a policy from its reference, and of a student from its teacher (distillation), from
logits or, in chunks and never [B, T, V], from two hidden states. Gradients flow to the
first only.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from jalign.losses.advantages import returns_to_go
from jalign.losses.checks import Array, Scalar, elementwise
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE, map_logits
from jalign.losses.logps import cap_logits


def kl_from_logits(
    logits: Array, ref_logits: Array, *, temperature: Scalar = 1.0
) -> jax.Array:
    """KL(π‖π_ref) = Σ_v π (log π - log π_ref), exact; the reverse KL of distillation.

    Args:
      logits: float32 [..., V], of π (the student).
      ref_logits: float32 [..., V], of π_ref (the teacher); no gradient flows. Columns
        at -inf must be so in both.
      temperature: > 0, divides both. The result is not multiplied by its square.

    Returns: float32 [...], nats, at least 0 up to rounding. Not reduced.
    Raises: AssertionError at trace time unless both are float32 of one shape.
    Source: definition; for distillation Gu et al. 2023, eq. 1 (arXiv:2306.08543).
    """
    log_p, log_q = _log_probs(logits, ref_logits, temperature)
    return _kl(log_p, log_q)


def forward_kl_from_logits(
    logits: Array, ref_logits: Array, *, temperature: Scalar = 1.0
) -> jax.Array:
    """KL(teacher‖student), exact: cross-entropy with the teacher's soft targets.

    Args:
      logits: float32 [..., V], of the student.
      ref_logits: float32 [..., V], of the teacher; no gradient flows. Columns at -inf
        must be so in both.
      temperature: > 0, divides both. The result is not multiplied by its square.

    Returns: float32 [...], nats, at least 0 up to rounding. Not reduced.
    Raises: AssertionError at trace time unless both are float32 of one shape.
    Source: Hinton et al. 2015 (arXiv:1503.02531).
    """
    log_p, log_q = _log_probs(logits, ref_logits, temperature)
    return _kl(log_q, log_p)


def jsd_from_logits(
    logits: Array,
    ref_logits: Array,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> jax.Array:
    """β KL(teacher‖M) + (1-β) KL(student‖M), M = β teacher + (1-β) student (GKD).

    At β = 0 it is the forward KL and at β = 1 the reverse KL, as in the field; the
    formula itself goes to 0 there.

    Args:
      logits: float32 [..., V], of the student.
      ref_logits: float32 [..., V], of the teacher; no gradient flows. Columns at -inf
        must be so in both.
      beta: β in [0, 1].
      temperature: > 0, divides both. The result is not multiplied by its square.

    Returns: float32 [...], nats, at least 0 up to rounding. Not reduced.
    Raises: AssertionError at trace time unless both are float32 of one shape.
    Source: Agarwal et al. 2023, "GKD", eq. 1 (arXiv:2306.13649).
    """
    log_p, log_q = _log_probs(logits, ref_logits, temperature)
    beta = jnp.asarray(beta, jnp.float32)
    inside = (beta > 0) & (beta < 1)
    b = jnp.where(inside, beta, 0.5)  # so that the branch not taken is finite
    possible = log_p > -jnp.inf
    log_p, log_q = (jnp.where(possible, x, 0.0) for x in (log_p, log_q))
    log_m = jnp.logaddexp(jnp.log1p(-b) + log_p, jnp.log(b) + log_q)
    forward, reverse = log_q - log_p, log_p - log_q
    teacher_part = jnp.where(inside, b * (log_q - log_m), (beta <= 0) * forward)
    student_part = jnp.where(inside, (1 - b) * (log_p - log_m), (beta >= 1) * reverse)
    terms = jnp.exp(log_q) * teacher_part + jnp.exp(log_p) * student_part
    return jnp.sum(jnp.where(possible, terms, 0.0), axis=-1)


def _log_probs(logits, ref_logits, temperature):
    """Log-softmax of either over temperature; none of the second's gradient."""
    chex.assert_equal_shape([logits, ref_logits])
    chex.assert_type([logits, ref_logits], jnp.float32)
    scaled = logits / temperature, jax.lax.stop_gradient(ref_logits / temperature)
    log_p, log_q = (jax.nn.log_softmax(x, axis=-1) for x in scaled)
    return log_p, log_q


def _kl(log_p, log_q):
    """Σ p (log p - log q), where 0 log 0 = 0."""
    possible = log_p > -jnp.inf
    log_p, log_q = (jnp.where(possible, x, 0.0) for x in (log_p, log_q))
    terms = jnp.exp(log_p) * (log_p - log_q)
    return jnp.sum(jnp.where(possible, terms, 0.0), axis=-1)


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
    heads = hidden, unembed, ref_hidden, ref_unembed
    caps = {"softcap": softcap, "ref_softcap": ref_softcap}
    return _map_both(
        kl_from_logits, heads, {"temperature": temperature}, chunk_size, **caps
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
    heads = hidden, unembed, ref_hidden, ref_unembed
    caps = {"softcap": softcap, "ref_softcap": ref_softcap}
    return _map_both(
        forward_kl_from_logits, heads, {"temperature": temperature}, chunk_size, **caps
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
    heads = hidden, unembed, ref_hidden, ref_unembed
    caps = {"softcap": softcap, "ref_softcap": ref_softcap}
    return _map_both(
        jsd_from_logits,
        heads,
        {"beta": beta, "temperature": temperature},
        chunk_size,
        **caps,
    )


def _map_both(function, heads, scalars, chunk_size, **caps):
    hidden, unembed, ref_hidden, ref_unembed = heads
    chex.assert_rank([ref_hidden, ref_unembed], [3, 2])
    chex.assert_type([ref_hidden, ref_unembed], float)
    chex.assert_equal(ref_hidden.shape[2], ref_unembed.shape[0])
    chex.assert_equal_shape_suffix([unembed, ref_unembed], 1)
    scalars = {k: jnp.asarray(v, jnp.float32) for k, v in scalars.items()}
    ref_unembed = jnp.asarray(ref_unembed).astype(ref_hidden.dtype)
    consts = ref_unembed, scalars
    row_fn = functools.partial(_row, function, **caps)
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


@elementwise(rank=2)
def reverse_kl_rewards(logps: Array, ref_logps: Array) -> jax.Array:
    """log teacher - log student, the reward whose maximum is the least reverse KL.

    Args:
      logps: float32 [B, T], nats, of the student's own tokens.
      ref_logps: float32 [B, T], the same under the teacher.

    Returns: token rewards, float32 [B, T]: -kl_k1. No gradient flows.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Gu et al. 2023, "MiniLLM", §2.2 (arXiv:2306.08543).
    """
    return jax.lax.stop_gradient(ref_logps - logps)


def mean_returns_to_go(
    token_rewards: Array, mask: Array, *, gamma: Scalar = 1.0
) -> jax.Array:
    """Σ_{i>=t} γ^{i-t} r_i / Σ_{i>=t} γ^{i-t}: the length-normalised return of MiniLLM.

    Without the division long completions would be punished for their length. The first
    step can be taken exactly: add token_kl(student, teacher) to the loss.

    Args:
      token_rewards: float32 [B, T], as reverse_kl_rewards makes them.
      mask: bool [B, T], True on the student's own tokens; the rest may hold anything.
      gamma: γ in [0, 1].

    Returns: float32 [B, T], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Gu et al. 2023, §2.2 (arXiv:2306.08543), from t on as in its code.
    """
    lengths = returns_to_go(jnp.ones_like(token_rewards), mask, gamma=gamma)
    return returns_to_go(token_rewards, mask, gamma=gamma) / jnp.maximum(lengths, 1.0)
