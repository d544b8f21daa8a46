"""From rewards and values to advantages: GAE, REINFORCE++, ReMax; KL-shaped rewards."""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask, elementwise
from jalign.losses.group_advantages import group_advantages
from jalign.losses.reduce import masked_whiten


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation, backwards over the counted tokens.

    A_t = δ_t + γλ A_{t'}, δ_t = r_t + γ V_{t'} - V_t, where t' is the next counted
    token of the row; after the last one A and V are 0. Tokens that are not counted
    (padding, a tool's answer) are skipped as if they were not there.

    Args:
      rewards: float32 [B, T], the reward for producing each token.
      values: float32 [B, T], value of the state before each token.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.
      gamma: γ in [0, 1].
      gae_lambda: λ in [0, 1].

    Returns: (advantages, returns = advantages + values), float32 [B, T] each, 0 where
      not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    """
    check_float32([rewards, values], rank=2)
    check_mask(mask, rewards)
    rewards = jax.lax.stop_gradient(jnp.where(mask, rewards, 0.0))
    values = jax.lax.stop_gradient(jnp.where(mask, values, 0.0))

    def backwards(carry, step):
        next_advantage, next_value = carry
        reward, value, counts = step
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * next_advantage
        new = (advantage, value)
        kept = [jnp.where(counts, x, old) for x, old in zip(new, carry, strict=True)]
        return tuple(kept), jnp.where(counts, advantage, 0.0)

    after_last = (jnp.zeros_like(values[:, 0]),) * 2
    time_first = (rewards.T, values.T, jnp.asarray(mask).T)
    _, advantages = jax.lax.scan(backwards, after_last, time_first, reverse=True)
    return advantages.T, advantages.T + values


def kl_shaped_rewards(
    rewards: Array,
    logps: Array,
    ref_logps: Array,
    mask: Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """-β (log π - log π_ref) on every counted token, and the reward on the last one.

    Args:
      rewards: float32 [B], one per completion.
      logps: float32 [B, T], nats, of the policy that sampled the tokens.
      ref_logps: float32 [B, T], the same under π_ref.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.
      beta: β >= 0, how tightly π is held to π_ref.

    Returns: token rewards, float32 [B, T], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Ziegler et al. 2019, eq. 2 (arXiv:1909.08593), per token as in its code.
    """
    check_float32([logps, ref_logps], rank=2)
    check_float32([rewards, logps[:, 0]], rank=1)
    check_mask(mask, logps)
    penalty = jnp.where(mask, -beta * (logps - ref_logps), 0.0)
    index = jax.lax.broadcasted_iota(jnp.int32, logps.shape, 1)
    last = jnp.max(jnp.where(mask, index, -1), axis=1, keepdims=True)
    token_rewards = penalty + jnp.where(index == last, rewards[:, None], 0.0)
    return jax.lax.stop_gradient(token_rewards)


def adaptive_kl_update(
    kl_coef: Scalar,
    kl: Scalar,
    *,
    target: Scalar,
    horizon: Scalar,
    num_samples: Scalar,
) -> jax.Array:
    """The next KL coefficient: β (1 + clip(KL/target - 1, ±0.2) n / horizon).

    Args:
      kl_coef: β > 0, scalar, the coefficient in use.
      kl: scalar, measured KL to the reference in nats, summed over a completion.
      target: > 0, the KL to be held, in the same unit.
      horizon: > 0, number of samples over which β may change by 20 %.
      num_samples: n, completions since the last update.

    Returns: float32 []. No gradient flows.
    Raises: AssertionError at trace time unless both are scalars.
    Source: Ziegler et al. 2019, §2.2 (arXiv:1909.08593).
    """
    chex.assert_rank([kl_coef, kl], 0)
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -0.2, 0.2)
    factor = 1.0 + error * num_samples / horizon
    return jax.lax.stop_gradient(jnp.asarray(kl_coef, jnp.float32) * factor)


def returns_to_go(
    token_rewards: Array, mask: Array, *, gamma: Scalar = 1.0
) -> jax.Array:
    """G_t = r_t + γ G_{t'}, where t' is the next counted token of the row.

    Args:
      token_rewards: float32 [B, T], as kl_shaped_rewards makes them.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.
      gamma: γ in [0, 1].

    Returns: float32 [B, T], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    """
    values = jnp.zeros_like(jnp.asarray(token_rewards))
    return gae(token_rewards, values, mask, gamma=gamma, gae_lambda=1.0)[0]


def reinforce_plus_plus_advantages(
    token_rewards: Array, mask: Array, *, gamma: Scalar = 1.0
) -> jax.Array:
    """returns_to_go whitened over all tokens of the batch (REINFORCE++).

    Args:
      token_rewards: float32 [B, T], as kl_shaped_rewards makes them: the KL penalty is
        in the reward.
      mask: bool [B, T], True on the policy's own tokens; the rest may hold anything.
      gamma: γ in [0, 1].

    Returns: float32 [B, T], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Hu et al. 2025, "REINFORCE++" (arXiv:2501.03262).
    """
    return masked_whiten(returns_to_go(token_rewards, mask, gamma=gamma), mask)


def reinforce_plus_plus_baseline_advantages(
    rewards: Array, group_ids: Array, mask: Array
) -> jax.Array:
    """r less its group's mean, at each token, whitened over all tokens of the batch.

    Its KL penalty is a loss (kl_k2) rather than a part of the reward.

    Args:
      rewards: float32 [B], one per completion.
      group_ids: int [B]; rows with the same id are completions of the same prompt.
      mask: bool [B, T], True on the policy's own tokens; a row without any is filler
        and may hold anything.

    Returns: float32 [B, T], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Hu et al. 2025, "REINFORCE++-baseline" (arXiv:2501.03262).
    """
    chex.assert_rank(mask, 2)
    rows = jnp.any(jnp.asarray(mask), axis=1)
    centered = group_advantages(rewards, group_ids, rows, scale_by_std=False)
    return masked_whiten(jnp.broadcast_to(centered[:, None], mask.shape), mask)


@elementwise(rank=1)
def remax_advantages(rewards: Array, greedy_rewards: Array) -> jax.Array:
    """r less the reward of the greedy completion of the same prompt (ReMax).

    Args:
      rewards: float32 [B], of sampled completions.
      greedy_rewards: float32 [B], of the greedy completions of the same prompts.

    Returns: float32 [B]. No gradient flows.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Li et al. 2023, "ReMax" (arXiv:2310.10505).
    """
    return jax.lax.stop_gradient(rewards - greedy_rewards)
