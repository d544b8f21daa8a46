"""Reward models: from pairs (Bradley–Terry), rankings, attributes, labelled steps."""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask, elementwise


@elementwise(rank=1)
def bradley_terry_loss(
    chosen_rewards: Array,
    rejected_rewards: Array,
    *,
    margin: Scalar | Array = 0.0,
) -> jax.Array:
    """-log σ(r_chosen - r_rejected - margin), one per pair.

    Args:
      chosen_rewards, rejected_rewards: float32 [B], the model's scores.
      margin: scalar or float32 [B], by how much the chosen one should at least win.

    Returns: float32 [B], nats; log 2 at equal rewards without margin. Not reduced.
    Raises: AssertionError at trace time unless the arrays are float32 [B].
    Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); margin: Touvron et al. 2023,
      eq. 2 (arXiv:2307.09288).
    """
    if jnp.ndim(margin):
        check_float32([chosen_rewards, margin], rank=1)  # pyright: ignore[reportArgumentType]
    return -jax.nn.log_sigmoid(chosen_rewards - rejected_rewards - margin)


@elementwise(rank=1)
def reward_center_loss(chosen_rewards: Array, rejected_rewards: Array) -> jax.Array:
    """(r_chosen + r_rejected)², which holds the scores of a prompt around 0.

    Bradley–Terry leaves each prompt's offset free. Add it with a small weight (0.01).

    Args:
      chosen_rewards, rejected_rewards: float32 [B].

    Returns: float32 [B]. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Eisenstein et al. 2023, §3.2 (arXiv:2312.09244).
    """
    return jnp.square(chosen_rewards + rejected_rewards)


@elementwise(rank=2)
def attribute_regression_loss(scores: Array, ratings: Array) -> jax.Array:
    """(score - rating)² of each attribute (helpfulness, correctness, ...).

    Attributes that were not rated are left to the reduction: `sequence_mean` gives each
    row the mean of those it has.

    Args:
      scores: float32 [B, A], the model's, one head for each attribute.
      ratings: float32 [B, A], the annotators'; no gradient flows.

    Returns: float32 [B, A]. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, A].
    Source: Wang et al. 2023, HelpSteer (arXiv:2311.09528), SteerLM: Dong et al. 2023
      (arXiv:2310.05344).
    """
    return jnp.square(scores - jax.lax.stop_gradient(ratings))


@elementwise(rank=2)
def process_reward_loss(logits: Array, labels: Array) -> jax.Array:
    """-y log σ(z) - (1-y) log σ(-z), per token: is the step right that ends here.

    Args:
      logits: float32 [B, T], z. Of a head with two outputs their difference: it is
        then the two-way cross-entropy.
      labels: float32 [B, T], y in [0, 1], 1 for a right step; shares of successful
        roll-outs are welcome. No gradient flows. The reduction's mask picks the
        last token of each step.

    Returns: float32 [B, T], nats. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Lightman et al. 2023 (arXiv:2305.20050); soft labels: Wang et al. 2023
      (arXiv:2312.08935).
    """
    labels = jax.lax.stop_gradient(labels)
    right, wrong = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -labels * right - (1 - labels) * wrong


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
