"""Rollouts of groups: the completions of a prompt compared with each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jalign import losses
from jalign.losses.group_advantages import EPS
from jalign.rewards import mean_of_judged
from jalign.train.online_config import GRPOOptions
from jalign.train.rollout import ROLLOUT_KL, Scored, reference_kl
from jalign.types import Rollout


def estimate_group_advantages(
    scores: np.ndarray, group_size: int, options: GRPOOptions
) -> np.ndarray:
    """Advantages of completions that lie behind each other by prompt.

    Args:
      scores: float32 [B], B a multiple of group_size.
      group_size: completions of each prompt.
      options: how they are scaled, or which loss says so.

    Returns: float32 [B]; statistics are over the whole groups and the whole batch.
    """
    scale = {
        "group": losses.group_advantages,
        "none": functools.partial(losses.group_advantages, scale_by_std=False),
        "batch": _batch_scaled,
        "auto": options.entry.advantages,
    }[options.scale_rewards]
    assert scale is not None, "the registry has them for every policy loss"
    group_ids = np.arange(len(scores), dtype=np.int32) // group_size
    every = np.ones(len(scores), bool)
    return np.asarray(scale(jnp.asarray(scores), group_ids, every))


def _batch_scaled(rewards: jax.Array, group_ids, mask) -> jax.Array:
    centered = losses.group_advantages(rewards, group_ids, mask, scale_by_std=False)
    return centered / (jnp.sqrt(losses.masked_var(rewards, mask)) + EPS)


def make_group_rollout(
    scored: Scored, scores: np.ndarray, options: GRPOOptions
) -> Rollout:
    """The batch for the objective: a completion's advantage at each of its tokens.

    With mask_truncated, the tokens of a completion that did not stop are not trained;
    its reward counts in the statistics of its group all the same.
    """
    mask = scored.batch.completion_mask
    if options.mask_truncated:
        mask = mask & scored.stopped[:, None]
    advantages = estimate_group_advantages(scores, options.group_size, options)
    return Rollout(
        *scored.batch._replace(completion_mask=mask),
        old_logps=scored.logps,
        ref_logps=scored.ref_logps,
        values=None,
        advantages=np.where(mask, advantages[:, None], np.float32(0.0)),
        returns=None,
        sampler_logps=scored.sampler_logps,
    )


def group_metrics(
    scored: Scored, scores: np.ndarray, group_size: int
) -> dict[str, float]:
    """Averages over a rollout, named as TRL's GRPO names them.

    `reward` is the weighted sum before clipping and penalty; `reward_std` the mean of
    the groups' unbiased deviations; `frac_reward_zero_std` the share of groups whose
    scores, after both, agree, and so teach nothing. `objective/kl`, where there is a
    reference, is PPO's: nats a completion.
    """
    deviations = scored.rewards.reshape(-1, group_size).std(axis=1, ddof=1)
    groups = scores.reshape(-1, group_size)
    ranges = groups.max(axis=1) - groups.min(axis=1)
    means = {
        "reward": scored.rewards.mean(),
        "reward_std": deviations.mean(),
        "frac_reward_zero_std": np.mean(ranges <= 1e-6 * np.abs(groups).max(axis=1)),
    }
    for name, values in scored.reward_parts.items():
        judged = values[~np.isnan(values)]
        means[f"rewards/{name}/mean"] = mean_of_judged(values)
        means[f"rewards/{name}/std"] = judged.std(ddof=1) if judged.size > 1 else 0.0
    if scored.ref_logps is not None:
        means[ROLLOUT_KL] = reference_kl(scored).mean()
    means |= _length_metrics(scored)
    return {name: float(value) for name, value in means.items()}


def _length_metrics(scored: Scored) -> dict[str, float]:
    """Tokens of all completions, and of those that stopped (0 if none did)."""
    lengths = scored.batch.completion_mask.sum(axis=1)
    terminated = lengths[scored.stopped] if scored.stopped.any() else np.zeros(1)
    found = {"completions/clipped_ratio": 1.0 - scored.stopped.mean()}
    for name, x in (("length", lengths), ("terminated_length", terminated)):
        extremes = {"min": x.min(), "max": x.max(), "mean": x.mean()}
        found |= {f"completions/{how}_{name}": v for how, v in extremes.items()}
    return found
