"""The policy loss of a completion as a single action (RLOO)."""

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, Scalar, elementwise
from jalign.losses.kl import clamped_ratio
from jalign.losses.ppo import clipped_objective


@elementwise(rank=1)
def rloo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> jax.Array:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A), ρ = Π_t π/π_old, one per completion.

    The completion is a single action; its A is leave_one_out_advantages of the rewards
    less β times the summed kl_k1. On policy it is `reinforce_loss` in its gradient.

    Args:
      logps: float32 [B], nats, summed over completion tokens (sequence_logps).
      old_logps: float32 [B], the same at rollout time; no gradient flows.
      advantages: float32 [B]; no gradient flows.
      clip_eps: ε in (0, 1).
      clip_eps_high: ε_high; None means ε.

    Returns: float32 [B]; -A where π = π_old. Not reduced. log ρ is held to ±20.
    Raises: AssertionError at trace time unless all three are float32 [B].
    Source: Ahmadian et al. 2024, "Back to Basics" (arXiv:2402.14740), with PPO's clip
      as in TRL's RLOOTrainer.
    """
    advantages = jax.lax.stop_gradient(advantages)
    ratio = clamped_ratio(logps, old_logps)
    unclipped, clipped = clipped_objective(ratio, advantages, clip_eps, clip_eps_high)
    return -jnp.minimum(unclipped, clipped)
