"""Advantages from several completions of one prompt, which are each other's baseline.

Groups are told by an id, not by place: the batch may be in any order, groups may be of
any size, and filler rows (mask False) count nowhere. Statistics are over the whole
array, whatever its sharding.
"""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, check_float32, check_mask
from jalign.losses.reduce import masked_var

EPS = 1e-4
"""Added to the standard deviation, not to the variance, as in TRL."""


def group_advantages(
    rewards: Array, group_ids: Array, mask: Array, *, scale_by_std: bool = True
) -> jax.Array:
    """(r - mean) / (std + 1e-4) within each group (GRPO), or r - mean (Dr. GRPO).

    A group of one, or whose rewards agree up to rounding, gets 0.

    Args:
      rewards: float32 [B], one per completion.
      group_ids: int [B]; rows with the same id are completions of the same prompt.
      mask: bool [B], False for filler rows; these may hold anything.
      scale_by_std: divide by the unbiased standard deviation of the group.

    Returns: float32 [B], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Shao et al. 2024, §4.1.2 (arXiv:2402.03300); without the deviation: Liu et
      al. 2025, "Dr. GRPO" (arXiv:2503.20783).
    """
    centered, std, _ = _group_statistics(rewards, group_ids, mask)
    return centered / (std + EPS) if scale_by_std else centered


def leave_one_out_advantages(
    rewards: Array, group_ids: Array, mask: Array
) -> jax.Array:
    """r_i - mean of the other rewards of its group (RLOO).

    A group of one, or whose rewards agree up to rounding, gets 0.

    Args:
      rewards, group_ids, mask: as in group_advantages.

    Returns: float32 [B], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740); Kool et al. 2019.
    """
    centered, _, size = _group_statistics(rewards, group_ids, mask)
    return centered * size / jnp.maximum(size - 1.0, 1.0)


def optimal_baseline_advantages(
    rewards: Array, group_ids: Array, mask: Array
) -> jax.Array:
    """r less its group's mean weighted by length, Σ l r / Σ l (OPO).

    The baseline of least variance where the square of a completion's gradient grows as
    its length. A group of one, or whose rewards agree up to rounding, gets 0.

    Args:
      rewards, group_ids: as in group_advantages.
      mask: bool [B, T], True on the policy's own tokens; a row without any is filler
        and may hold anything.

    Returns: float32 [B], 0 where not counted. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Hao et al. 2025, "OPO" (arXiv:2505.23585).
    """
    chex.assert_rank(mask, 2)
    chex.assert_type(mask, jnp.bool_)
    lengths = jnp.sum(jnp.asarray(mask), axis=1, dtype=jnp.float32)
    rows = lengths > 0
    centered, _, _ = _group_statistics(rewards, group_ids, rows)
    over_group = _over_group(group_ids, rows)
    shift = over_group(lengths * centered) / jnp.maximum(over_group(lengths), 1.0)
    return jnp.where(rows, centered - shift, 0.0)


def gdpo_advantages(
    rewards: Array, weights: Array, group_ids: Array, mask: Array
) -> jax.Array:
    """Each reward normalised within its groups, summed, and normalised over the batch.

    Summed first, as in GRPO, different rewards could give the same sum and so the same
    advantage; here each keeps its own scale.

    Args:
      rewards: float32 [B, K], K rewards of each completion.
      weights: float32 [K], of the normalised rewards.
      group_ids: int [B]; rows with the same id are completions of the same prompt.
      mask: bool [B, K], False where a reward does not apply; a row without any is
        filler. What is not counted may hold anything.

    Returns: float32 [B], 0 for a row without a reward. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: "GDPO: Group reward-Decoupled Normalization Policy Optimization"
      (arXiv:2601.05242); 1e-4 and unbiased deviations as in TRL.
    """
    check_float32([weights], rank=1)
    chex.assert_shape(weights, rewards.shape[1:])
    check_mask(mask, rewards)

    def normalised(rewards, mask, weight):
        advantages = group_advantages(rewards, group_ids, mask)
        return jnp.where(mask, weight * advantages, 0.0)

    total = jnp.sum(jax.vmap(normalised, (1, 1, 0))(rewards, mask, weights), axis=0)
    total = jax.lax.stop_gradient(total)
    rows = jnp.any(mask, axis=1)
    # Its mean is 0: that of each reward is, within each group.
    std = jnp.sqrt(masked_var(total, rows))
    return jnp.where(rows, total / (std + EPS), 0.0)


def _group_statistics(rewards, group_ids, mask):
    """(r - mean, unbiased std, size) of each row's group, [B] each."""
    check_float32([rewards], rank=1)
    check_mask(mask, rewards)
    chex.assert_type(group_ids, int)
    chex.assert_equal_shape([group_ids, rewards])
    over_group = _over_group(group_ids, mask)
    rewards = jax.lax.stop_gradient(jnp.where(mask, rewards, 0.0))
    size = over_group(jnp.ones_like(rewards))
    mean = over_group(rewards) / jnp.maximum(size, 1.0)
    centered = rewards - mean
    var = over_group(jnp.square(centered)) / jnp.maximum(size - 1.0, 1.0)
    noise = jnp.square(1e-6 * over_group(jnp.abs(rewards), jnp.max))
    signal = mask & (var > noise)
    return jnp.where(signal, centered, 0.0), jnp.sqrt(var), size


def _over_group(group_ids, mask):
    """A function: x [B] -> its sum over the counted rows of each row's group, [B]."""
    group_ids, mask = jnp.asarray(group_ids), jnp.asarray(mask)
    same = group_ids[:, None] == everywhere(group_ids)[None, :]
    same &= everywhere(mask.astype(jnp.int32))[None, :] > 0

    # A sum, not a product of matrices, which accelerators would take in bfloat16.
    def over_group(x, reduce=jnp.sum):
        return reduce(jnp.where(same, everywhere(x)[None, :], 0.0), axis=1)

    return over_group


def everywhere(x: jax.Array) -> jax.Array:
    """x [B] as each device has it all, so that [B, B] is split along one axis only.

    By a sum over the split axis, and so without naming an axis of the mesh; of one
    entry each, so that nothing is rounded.
    """
    row, column = (
        jax.lax.broadcasted_iota(jnp.int32, (x.size, x.size), i) for i in (0, 1)
    )
    return jnp.sum(jnp.where(row == column, x[None, :], jnp.zeros((), x.dtype)), axis=1)
