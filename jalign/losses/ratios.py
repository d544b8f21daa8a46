"""Log-ratios of two programs: estimators of KL(π‖π_ref) from tokens sampled from π
(Schulman 2020), and weights that correct for tokens sampled by another program.

An inference engine gives the same parameters slightly other probabilities than the
trainer. A policy loss times one of these weights is corrected for it (the KL penalty is
not multiplied).
"""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask, elementwise

MAX_LOG_RATIO = 20.0
"""Log-ratios are held to ±20 before exp: e²⁰ is 5e8, and e⁸⁹ is no float32."""


def clamped_ratio(logps: Array, old_logps: Array) -> jax.Array:
    """exp(logps - old_logps), the difference held to ±20; no gradient to old_logps.

    Beyond ±20 the gradient is 0: a policy so far off is to be reported, not trained.
    """
    return jnp.exp(hold(logps - jax.lax.stop_gradient(old_logps)))


@elementwise(rank=2)
def kl_k1(logps: Array, ref_logps: Array) -> jax.Array:
    """log π - log π_ref: unbiased, of either sign. For rewards, not as a loss.

    Args:
      logps: float32 [B, T], nats, of tokens sampled from π.
      ref_logps: float32 [B, T], the same under π_ref; no gradient flows.

    Returns: float32 [B, T], nats. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return logps - jax.lax.stop_gradient(ref_logps)


@elementwise(rank=2)
def kl_k2(logps: Array, ref_logps: Array) -> jax.Array:
    """½ (log π - log π_ref)²: biased, but its gradient is that of the KL.

    Args:
      logps, ref_logps: as in kl_k1.

    Returns: float32 [B, T], nats, at least 0. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return 0.5 * jnp.square(logps - jax.lax.stop_gradient(ref_logps))


@elementwise(rank=2)
def kl_k3(logps: Array, ref_logps: Array) -> jax.Array:
    """e^d - 1 - d with d = log π_ref - log π, held to ±20: unbiased, at least 0.

    Args:
      logps, ref_logps: as in kl_k1.

    Returns: float32 [B, T], nats, at least 0. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    # Held before the exp: after it the gradient would be 0 * inf = NaN.
    d = hold(jax.lax.stop_gradient(ref_logps) - logps)
    return jnp.expm1(d) - d


def hold(log_ratio: jax.Array) -> jax.Array:
    """The log-ratio held to ±20, with gradient 0 beyond."""
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


@elementwise(rank=2)
def truncated_importance_weights(
    old_logps: Array,
    sampler_logps: Array,
    *,
    max_ratio: Scalar,
    min_ratio: Scalar = 0.0,
) -> jax.Array:
    """clip(π_old/π_sampler, min, max) of each token (TIS).

    Args:
      old_logps: float32 [B, T], nats, by the trainer with the sampler's parameters.
      sampler_logps: float32 [B, T], as the sampler reported them. Where it reported
        none, put old_logps: the weight is 1.
      max_ratio: > 0; 2 in verl, 3 in TRL.
      min_ratio: in [0, max_ratio].

    Returns: float32 [B, T]. No gradient flows. The log-ratio is held to ±20.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
      RL Training"; TRL's mode `token_truncate`.
    """
    ratio = jax.lax.stop_gradient(clamped_ratio(old_logps, sampler_logps))
    return jnp.clip(ratio, min_ratio, max_ratio)


@elementwise(rank=2)
def masked_importance_weights(
    old_logps: Array,
    sampler_logps: Array,
    *,
    max_ratio: Scalar,
    min_ratio: Scalar = 0.0,
) -> jax.Array:
    """π_old/π_sampler of each token, or 0 where it is outside [min, max] (MIS).

    Args:
      old_logps, sampler_logps, max_ratio, min_ratio: as in
        truncated_importance_weights.

    Returns: float32 [B, T]. No gradient flows. The log-ratio is held to ±20.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Liu et al. 2025, "When Speed Kills Stability"; TRL's mode `token_mask`.
    """
    ratio = jax.lax.stop_gradient(clamped_ratio(old_logps, sampler_logps))
    return _inside(ratio, min_ratio, max_ratio)


def sequence_truncated_importance_weights(
    old_logps: Array,
    sampler_logps: Array,
    mask: Array,
    *,
    max_ratio: Scalar,
    min_ratio: Scalar = 0.0,
) -> jax.Array:
    """clip(Π_t π_old/π_sampler, min, max) of each sequence, at each of its tokens.

    The product grows with the length: a bias of 0.012 a token is a factor of 3.3 after
    100 tokens. Look at the ratios before choosing this rather than tokens.

    Args:
      old_logps, sampler_logps, max_ratio, min_ratio: as in
        truncated_importance_weights.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.

    Returns: float32 [B, T], 0 where not counted. No gradient flows. The logarithm of
      the product is held to ±20.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: as truncated_importance_weights; TRL's mode `sequence_truncate`.
    """
    ratio = _sequence_ratio(old_logps, sampler_logps, mask)
    return jnp.where(mask, jnp.clip(ratio, min_ratio, max_ratio), 0.0)


def sequence_masked_importance_weights(
    old_logps: Array,
    sampler_logps: Array,
    mask: Array,
    *,
    max_ratio: Scalar,
    min_ratio: Scalar = 0.0,
) -> jax.Array:
    """Π_t π_old/π_sampler of each sequence at each of its tokens, 0 outside the bounds.

    Args:
      old_logps, sampler_logps, mask, max_ratio, min_ratio: as in
        sequence_truncated_importance_weights; long sequences are dropped first.

    Returns: float32 [B, T], 0 where not counted. No gradient flows. The logarithm of
      the product is held to ±20.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: as masked_importance_weights; TRL's mode `sequence_mask`.
    """
    ratio = _sequence_ratio(old_logps, sampler_logps, mask)
    return jnp.where(mask, _inside(ratio, min_ratio, max_ratio), 0.0)


def off_policy_mask(
    logps: Array,
    sampler_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    threshold: Scalar,
) -> jax.Array:
    """1, but 0 for sequences with A < 0 that π has moved away from; times the loss.

    Away: mean_t (log π_sampler - log π) > threshold.

    Args:
      logps: float32 [B, T], nats, of the policy being trained.
      sampler_logps: float32 [B, T], of the policy that sampled (or old_logps).
      advantages: float32 [B, T], one value along a row.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.
      threshold: > 0, nats a token.

    Returns: float32 [B, T], 0 or 1, 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: DeepSeek-AI 2025, "DeepSeek-V3.2", off-policy sequence masking
      (arXiv:2512.02556).
    """
    check_float32([logps, sampler_logps, advantages], rank=2)
    check_mask(mask, logps)
    gap = jnp.sum(jnp.where(mask, sampler_logps - logps, 0.0), axis=1)
    lengths = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)
    near = jnp.broadcast_to((gap / lengths <= threshold)[:, None], mask.shape)
    kept = mask & (near | (jnp.where(mask, advantages, 0.0) >= 0))
    return kept.astype(jnp.float32)


def _sequence_ratio(old_logps, sampler_logps, mask):
    """Π_t π_old/π_sampler over the counted tokens, [B, T], one value along a row."""
    check_float32([old_logps, sampler_logps], rank=2)
    check_mask(mask, old_logps)
    log_ratio = jnp.sum(jnp.where(mask, old_logps - sampler_logps, 0.0), axis=1)
    ratio = jax.lax.stop_gradient(jnp.exp(hold(log_ratio)))
    return jnp.broadcast_to(ratio[:, None], mask.shape)


def _inside(ratio, low, high):
    return jnp.where((ratio < low) | (ratio > high), 0.0, ratio)
