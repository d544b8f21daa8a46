"""Exact divergences between two distributions over the vocabulary.

Of a policy from its reference, and of a student from its teacher (distillation).
Gradients flow to the first only. `token_divergence.py` has them in chunks, from hidden
states.
"""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, Scalar


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
