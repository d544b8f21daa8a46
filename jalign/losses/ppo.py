"""Proximal policy optimization (PPO): clipped policy and value losses."""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, elementwise
from jalign.losses.ratios import clamped_ratio, kl_k2


@elementwise(rank=2)
def ppo_policy_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
) -> jax.Array:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A) with ρ = π/π_old, per token.

    This is also the loss of GRPO, Dr. GRPO, DAPO and BNPO, which differ in their
    advantages and reductions (docs/policy_gradients.md).

    Args:
      logps: float32 [B, T], nats.
      old_logps: float32 [B, T], the same at rollout time; no gradient flows.
      advantages: float32 [B, T]; no gradient flows.
      clip_eps: ε in (0, 1).
      clip_eps_high: ε_high; None means ε.
      dual_clip: c > 1 + ε_high (3 in the paper) bounds the loss by -c A where A < 0:
        a token that has become c times likelier pulls no more. None means no bound.

    Returns: float32 [B, T]; -A where π = π_old. Not reduced. log ρ is held to ±20.
    Raises: AssertionError at trace time unless all three are float32 [B, T].
    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); ε_high: Yu et al. 2025,
      eq. 10 (arXiv:2503.14476); c: Ye et al. 2020 (arXiv:1912.09729); the `delta`
      of INTELLECT-2 (arXiv:2505.07291).
    """
    advantages = jax.lax.stop_gradient(advantages)
    ratio = clamped_ratio(logps, old_logps)
    if dual_clip is not None:
        ratio = jnp.minimum(ratio, dual_clip)
    unclipped, clipped = clipped_objective(ratio, advantages, clip_eps, clip_eps_high)
    return -jnp.minimum(unclipped, clipped)


@elementwise(rank=2)
def ppo_value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    *,
    clip_eps: Scalar,
) -> jax.Array:
    """½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²), per token.

    Args:
      values: float32 [B, T], the critic's value of the state before each token.
      old_values: float32 [B, T], the same at rollout time; no gradient flows.
      returns: float32 [B, T], the targets; no gradient flows.
      clip_eps: ε > 0; infinity for no clipping.

    Returns: float32 [B, T]. Not reduced.
    Raises: AssertionError at trace time unless all three are float32 [B, T].
    Source: Schulman et al. 2017, implementation (github.com/openai/baselines, ppo2).
    """
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    clipped = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
    errors = jnp.square(values - returns), jnp.square(clipped - returns)
    return 0.5 * jnp.maximum(*errors)


@elementwise(rank=2)
def clip_frac(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> jax.Array:
    """1 where ppo_policy_loss takes the clipped branch (gradient 0), else 0; a metric.

    Args:
      logps, old_logps, advantages, clip_eps, clip_eps_high: as in ppo_policy_loss.

    Returns: float32 [B, T], 0 or 1. Not reduced. No gradient flows.
    Raises: AssertionError at trace time unless all three are float32 [B, T].
    """
    ratio = clamped_ratio(logps, old_logps)
    unclipped, clipped = clipped_objective(ratio, advantages, clip_eps, clip_eps_high)
    return (clipped < unclipped).astype(jnp.float32)


@elementwise(rank=2)
def approx_kl(logps: Array, old_logps: Array) -> jax.Array:
    """½ (log π - log π_old)², how far the update has moved the policy; a metric.

    Args:
      logps, old_logps: float32 [B, T], nats.

    Returns: float32 [B, T], nats, at least 0. Not reduced. No gradient flows.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Schulman 2020 (kl_k2), as TRL's `approxkl`.
    """
    return jax.lax.stop_gradient(kl_k2(logps, old_logps))


def clipped_objective(
    ratio: jax.Array,
    advantages: jax.Array,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None,
) -> tuple[jax.Array, jax.Array]:
    """ρ A and clip(ρ, 1 - ε, 1 + ε_high) A, of which PPO takes the smaller."""
    high = clip_eps if clip_eps_high is None else clip_eps_high
    return ratio * advantages, jnp.clip(ratio, 1 - clip_eps, 1 + high) * advantages
