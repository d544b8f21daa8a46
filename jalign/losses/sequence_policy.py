"""Policy losses whose ratio belongs to a whole sequence, not to a token.

The loss of a sequence stands at each of its tokens, so that it adds up with losses of
tokens and the reduction chooses the weights: `sequence_mean` gives GSPO and GMPO,
`sequence_sum_mean` of `gspo_loss` gives LUSPO, `token_mean` of `vespo_loss` VESPO.
"""

import math

import jax
import jax.numpy as jnp

from jalign.losses.checks import (
    Array,
    Scalar,
    check_float32,
    check_mask,
)
from jalign.losses.ppo import clipped_objective
from jalign.losses.ratios import MAX_LOG_RATIO, hold

MIN_LOG_WEIGHT = math.log(1e-8)
"""VESPO holds log w to [log 1e-8, 20], as its authors' code does."""


def gspo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> jax.Array:
    """-min(s A, clip(s, 1 - ε, 1 + ε_high) A), s = exp(mean_t log π/π_old), per token.

    Args:
      logps: float32 [B, T], nats.
      old_logps: float32 [B, T], the same at rollout time; no gradient flows.
      advantages: float32 [B, T], one value along a row; no gradient flows.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.
      clip_eps: ε > 0, far smaller than for tokens: the paper takes 3e-4.
      clip_eps_high: ε_high, 4e-4 in the paper; None means ε.

    Returns: float32 [B, T], 0 where not counted; -A where π = π_old. Not reduced: use
      sequence_mean, or sequence_sum_mean for LUSPO. log s is held to ±20.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Zheng et al. 2025, "Group Sequence Policy Optimization"
      (arXiv:2507.18071); LUSPO: arXiv:2602.05261.
    """
    log_ratio, advantages = _clean(logps, old_logps, advantages, mask)
    ratio = _spread(jnp.exp(hold(_row_mean(log_ratio, mask))), mask)
    unclipped, clipped = clipped_objective(ratio, advantages, clip_eps, clip_eps_high)
    return jnp.where(mask, -jnp.minimum(unclipped, clipped), 0.0)


def gspo_token_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> jax.Array:
    """gspo_loss with s_t = sg[s] π/sg[π]: each token carries its own gradient.

    The values are those of gspo_loss; so are the gradients of sequence_mean if A is
    constant along a row. Where A differs from token to token, use this one.

    Args:
      logps, old_logps, mask, clip_eps, clip_eps_high: as in gspo_loss.
      advantages: float32 [B, T], of each token; no gradient flows.

    Returns: float32 [B, T], 0 where not counted. Not reduced. log s is held to ±20.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Zheng et al. 2025, §4.3 "GSPO-token" (arXiv:2507.18071).
    """
    log_ratio, advantages = _clean(logps, old_logps, advantages, mask)
    log_s = hold(_row_mean(jax.lax.stop_gradient(log_ratio), mask))
    own = log_ratio - jax.lax.stop_gradient(log_ratio)  # 0 with the gradient of log π
    ratio = jnp.exp(_spread(log_s, mask) + own)
    unclipped, clipped = clipped_objective(ratio, advantages, clip_eps, clip_eps_high)
    return jnp.where(mask, -jnp.minimum(unclipped, clipped), 0.0)


def gmpo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar = 0.4,
    clip_eps_high: Scalar | None = None,
) -> jax.Array:
    """-A exp(mean_t d_t), d = log π/π_old clipped one-sidedly: the geometric mean.

    d_t = min(d, ε_high) where A > 0, else max(d, -ε): the clip is of the logarithm.

    Args:
      logps, old_logps, mask: as in gspo_loss.
      advantages: float32 [B, T], one value along a row; no gradient flows.
      clip_eps: ε > 0, in nats.
      clip_eps_high: ε_high, in nats; None means ε.

    Returns: float32 [B, T], 0 where not counted; -A where π = π_old. Not reduced: use
      sequence_mean. The mean of d is held to ±20.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Zhao et al. 2025, "Geometric-Mean Policy Optimization" (arXiv:2507.20673).
    """
    log_ratio, advantages = _clean(logps, old_logps, advantages, mask)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    clipped = jnp.where(
        advantages > 0,
        jnp.minimum(log_ratio, high),
        jnp.maximum(log_ratio, -clip_eps),
    )
    ratio = _spread(jnp.exp(hold(_row_mean(clipped, mask))), mask)
    return jnp.where(mask, -ratio * advantages, 0.0)


def vespo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    k_pos: Scalar = 2.0,
    lambda_pos: Scalar = 3.0,
    k_neg: Scalar = 3.0,
    lambda_neg: Scalar = 2.0,
) -> jax.Array:
    """-sg[φ(w)] A log π, φ(w) = w^k exp(λ (1 - w)), w = Π_t π/π_old of the sequence.

    φ(1) = 1, and sequences far from the policy fade out on either side. To correct for
    an external sampler give its log-probabilities as old_logps.

    Args:
      logps, old_logps, mask: as in gspo_loss.
      advantages: float32 [B, T], one value along a row; no gradient flows.
      k_pos, lambda_pos: k and λ > 0 where A >= 0.
      k_neg, lambda_neg: k and λ > 0 where A < 0.

    Returns: float32 [B, T], 0 where not counted. Not reduced: use token_mean. Token
      log-ratios are held to ±20, log w to [log 1e-8, 20].
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: "Variational Sequence-Level Soft Policy Optimization" (arXiv:2602.10693);
      bounds and defaults as in TRL's `get_gamma_weights`.
    """
    log_ratio, advantages = _clean(logps, old_logps, advantages, mask)
    total = jnp.sum(jax.lax.stop_gradient(hold(log_ratio)), axis=1)
    log_w = _spread(jnp.clip(total, MIN_LOG_WEIGHT, MAX_LOG_RATIO), mask)
    k = jnp.where(advantages >= 0, k_pos, k_neg)
    lam = jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    phi = jnp.exp(lam + k * log_w - lam * jnp.exp(log_w))
    return -phi * advantages * jnp.where(mask, logps, 0.0)


def _clean(logps, old_logps, advantages, mask):
    """Checked log π/π_old and A, [B, T] each, 0 where not counted."""
    check_float32([logps, old_logps, advantages], rank=2)
    check_mask(mask, logps)
    log_ratio = jnp.where(mask, logps - jax.lax.stop_gradient(old_logps), 0.0)
    return log_ratio, jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))


def _row_mean(x: jax.Array, mask: Array) -> jax.Array:
    """Mean over each row's counted entries (the others are 0), [B]."""
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    return jnp.sum(x, axis=1) / jnp.maximum(lengths, 1.0)


def _spread(x: jax.Array, mask: Array) -> jax.Array:
    """[B] -> [B, T], the same at each token."""
    return jnp.broadcast_to(x[:, None], mask.shape)
