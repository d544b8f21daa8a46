"""GRPO and its relatives: what is particular to them.

No critic; a completion's baseline are the other completions of its prompt. After Shao
et al. 2024 (arXiv:2402.03300); the variants differ in the loss of a token, in their
advantages, and in how tokens are averaged: each is a row of `train.loss_table`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import losses
from jalign.losses.group_advantages import EPS
from jalign.models import Model
from jalign.rewards import mean_of_judged
from jalign.train.loss_table import OF_GROUPS
from jalign.train.objectives import Objective
from jalign.train.online_config import GRPOOptions
from jalign.train.optim import OptimConfig
from jalign.train.policy_objectives import make_grpo_objective
from jalign.train.rollout import Scored, common_metrics
from jalign.train.updates import Algorithm
from jalign.types import Array, Rollout


def grpo_objectives(
    models: Mapping[str, Model], grpo: GRPOOptions, optim: OptimConfig
) -> dict[str, tuple[Objective, OptimConfig]]:
    """Of the policy alone."""
    objective = make_grpo_objective(
        models["policy"],
        terms=grpo.terms(),
        reduction=grpo.reduction,
        beta=grpo.beta,
        entropy_coef=grpo.entropy_coef,
        temperature=grpo.sampling.temperature,
    )
    return {"policy": (objective, optim)}


def estimate_group_advantages(
    scores: np.ndarray, mask: Array, options: GRPOOptions
) -> np.ndarray:
    """Advantages of completions that lie behind each other by prompt.

    Args:
      scores: float32 [B], B a multiple of group_size.
      mask: bool [B, T], the completions' tokens.
      options: group_size, and how they are scaled, or which loss says so.

    Returns: float32 [B]; statistics are over whole groups and the whole batch.
    """
    entry = options.entry
    scaled = {
        "group": losses.group_advantages,
        "none": functools.partial(losses.group_advantages, scale_by_std=False),
        "batch": _batch_scaled,
    }
    function, inputs = entry.advantages, entry.advantage_inputs
    if options.scale_rewards != "auto":
        function, inputs = scaled[options.scale_rewards], OF_GROUPS
    assert function is not None, "the registry has them for every policy loss"
    arrays = {
        "rewards": jnp.asarray(scores),
        "group_ids": np.arange(len(scores), dtype=np.int32) // options.group_size,
        "mask": np.ones(len(scores), bool),
        "completion_mask": mask,
    }
    return np.asarray(function(*(arrays[name] for name in inputs)))


def _batch_scaled(rewards: jax.Array, group_ids, mask) -> jax.Array:
    centered = losses.group_advantages(rewards, group_ids, mask, scale_by_std=False)
    return centered / (jnp.sqrt(losses.masked_var(rewards, mask)) + EPS)


def make_group_rollout(
    scored: Scored, scores: np.ndarray, kl_coef: float, options: GRPOOptions
) -> Rollout:
    """The batch for the objective: a completion's advantage at each of its tokens.

    With mask_truncated, the tokens of a completion that did not stop are not trained;
    its reward counts in the statistics of its group all the same.
    """
    del kl_coef  # the KL is in the loss
    mask = scored.batch.completion_mask
    advantages = estimate_group_advantages(scores, mask, options)
    if options.mask_truncated:
        mask = mask & scored.stopped[:, None]
    return Rollout(
        *scored.batch._replace(completion_mask=mask),
        old_logps=scored.logps,
        ref_logps=scored.ref_logps,
        values=None,
        advantages=np.where(mask, advantages[:, None], np.float32(0.0)),
        returns=None,
        sampler_logps=scored.sampler_logps,
        routing=scored.routing,
    )


def group_metrics(
    scored: Scored, scores: np.ndarray, kl_coef: float, options: GRPOOptions
) -> dict[str, Any]:
    """Averages over a rollout, named as TRL's GRPO names them.

    `reward` is the weighted sum before clipping and penalty; `reward_std` the mean of
    the groups' unbiased deviations; `frac_reward_zero_std` the share of groups whose
    scores, after both, agree, and so teach nothing. `objective/kl`, where there is a
    reference, is PPO's: nats a completion.
    """
    del kl_coef
    groups = scores.reshape(-1, options.group_size)
    ranges = groups.max(axis=1) - groups.min(axis=1)
    deviations = scored.rewards.reshape(groups.shape).std(axis=1, ddof=1)
    means = common_metrics(scored) | {
        "reward_std": deviations.mean(),
        "frac_reward_zero_std": np.mean(ranges <= 1e-6 * np.abs(groups).max(axis=1)),
    }
    for name, values in scored.reward_parts.items():
        judged = values[~np.isnan(values)]
        means[f"rewards/{name}/mean"] = mean_of_judged(values)
        means[f"rewards/{name}/std"] = judged.std(ddof=1) if judged.size > 1 else 0.0
    lengths = scored.batch.completion_mask.sum(axis=1)
    # Of those that stopped; 0 if none did.
    terminated = lengths[scored.stopped] if scored.stopped.any() else np.zeros(1)
    for name, x in (("length", lengths), ("terminated_length", terminated)):
        extremes = {"min": x.min(), "max": x.max(), "mean": x.mean()}
        means |= {f"completions/{how}_{name}": v for how, v in extremes.items()}
    return means


def update_extremes(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Over the updates of an iteration, by TRL's names: extremes of what is clipped and
    of trainer's less sampler's log-probability (0 where no token was trained)."""
    low, high = found["min_sampler_gap"].min(), found["max_sampler_gap"].max()
    low, high = (0.0, 0.0) if low > high else (low, high)
    return {
        "clip_ratio/low_min": found["clip_ratio/low_mean"].min(),
        "clip_ratio/high_max": found["clip_ratio/high_mean"].max(),
        # 1 up to rounding, or the pass and the update do not share one model.
        "ratio_first": found["ratio"][0],
        "sampling/sampling_logp_difference/max": max(high, -low),
        "sampling/importance_sampling_ratio/min": np.exp(low),
        "sampling/importance_sampling_ratio/max": np.exp(high),
    }


GRPO = Algorithm(
    "grpo",
    grpo_objectives,
    make_group_rollout,
    group_metrics,
    update_extremes,
    reads_logps=False,
)
