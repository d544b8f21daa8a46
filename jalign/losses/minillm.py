"""Distillation by policy gradient: the teacher's log-ratio as a reward (MiniLLM)."""

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, Scalar, elementwise
from jalign.losses.reinforce import returns_to_go


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
