"""Advantages of REINFORCE++ and ReMax: rewards to come less a simple baseline."""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.advantages import gae
from jalign.losses.elementwise import Array, Scalar, elementwise
from jalign.losses.group_advantages import group_advantages
from jalign.losses.reduce import masked_whiten


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
