"""Reward models from rankings of K completions."""

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, check_float32, check_mask


def pairwise_ranking_loss(rewards: Array, mask: Array) -> jax.Array:
    """Mean over the pairs i < j of -log σ(r_i - r_j), one per ranking.

    All pairs of a prompt in one row: they share its forward passes and weigh as much
    as one prompt, so that it is not overfitted.

    Args:
      rewards: float32 [B, K], the model's scores, best completion first.
      mask: bool [B, K], True for the completions there are; the rest may hold anything.

    Returns: float32 [B], nats; 0 for fewer than two completions. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155).
    """
    rewards = _checked(rewards, mask)
    pairs = _before(mask)
    losses = -jax.nn.log_sigmoid(rewards[:, :, None] - rewards[:, None, :])
    total = jnp.sum(jnp.where(pairs, losses, 0.0), axis=(1, 2))
    count = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    return total / jnp.maximum(count, 1.0)


def plackett_luce_loss(rewards: Array, mask: Array) -> jax.Array:
    """Σ_i [logsumexp_{j >= i} r_j - r_i], one per ranking: the K-wise loss.

    -log of the ranking's probability when the best of what is left is drawn with
    softmax(r), again and again. Of two completions it is Bradley–Terry.

    Args:
      rewards: float32 [B, K], the model's scores, best completion first.
      mask: bool [B, K], True for the completions there are; the rest may hold anything.

    Returns: float32 [B], nats; log K! at equal rewards. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Zhu et al. 2023 (arXiv:2301.11270), as in Starling-RM.
    """
    rewards = _checked(rewards, mask)
    # Itself among what is left, also where it does not count: no sum is empty.
    left = _before(mask) | jnp.eye(mask.shape[1], dtype=bool)[None]
    others = jnp.broadcast_to(rewards[:, None, :], left.shape)
    total = jax.nn.logsumexp(others, axis=2, where=left)
    return jnp.sum(jnp.where(mask, total - rewards, 0.0), axis=1)


def _checked(rewards: Array, mask: Array) -> jax.Array:
    check_float32([rewards], rank=2)
    check_mask(mask, rewards)
    return jnp.where(mask, rewards, 0.0)


def _before(mask: Array) -> jax.Array:
    """[B, K, K]: i is ranked above j and both are there."""
    mask = jnp.asarray(mask)
    above = jnp.triu(jnp.ones((mask.shape[1],) * 2, bool), 1)
    return above[None] & mask[:, :, None] & mask[:, None, :]
