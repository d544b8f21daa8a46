"""The online algorithms: what is particular to PPO, and to GRPO and its relatives.

PPO: separate models and optimizers, as in Ouyang et al. 2022 (arXiv:2203.02155), or,
with shared_trunk, two heads of one model, as in Schulman et al. 2017 (arXiv:1707.06347,
eq. 9). Details after Huang et al. 2024 (arXiv:2403.17031).

GRPO (arXiv:2402.03300): no critic; a prompt's completions are each other's baseline.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import losses
from jalign.losses.group_advantages import EPS
from jalign.models import Model
from jalign.rewards import mean_of_judged
from jalign.train.objectives import Objective
from jalign.train.online_config import GRPOOptions, PPOOptions
from jalign.train.optim import OptimConfig
from jalign.train.policy_objectives import (
    make_grpo_objective,
    make_ppo_objective,
    make_value_objective,
)
from jalign.train.rollout import ROLLOUT_KL, Scored, common_metrics
from jalign.train.updates import Algorithm
from jalign.types import Array, Rollout


def ppo_objectives(
    models: Mapping[str, Model], ppo: PPOOptions, optim: OptimConfig
) -> dict[str, tuple[Objective, OptimConfig]]:
    """Of the policy and of its critic, where that is a model of its own."""
    clip, rate = ppo.critic.value_clip_eps, ppo.critic.critic_learning_rate
    objective = make_ppo_objective(
        models["policy"],
        clip_eps=ppo.clip_eps,
        entropy_coef=ppo.entropy_coef,
        temperature=ppo.sampling.temperature,
        value_coef=ppo.critic.value_coef or 0.1,
        value_clip_eps=clip,
    )
    trained = {"policy": (objective, optim)}
    if "critic" in models:
        own = optim if rate is None else replace(optim, learning_rate=rate)
        value = make_value_objective(models["critic"], clip_eps=clip)
        trained["critic"] = (value, own)
    return trained


@functools.partial(jax.jit, static_argnames=("whiten_rewards", "whiten_advantages"))
def estimate_advantages(
    scores: jax.Array,
    logps: jax.Array,
    ref_logps: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """KL-shaped token rewards, then GAE, then whitening.

    The score stands on the completion's last token, and -kl_coef * kl_k1 on every
    one. Returns are made of the advantages *before* whitening.

    Args:
      scores: float32 [B].
      logps, ref_logps, values: float32 [B, T].
      mask: bool [B, T], the completions.
      kl_coef, gamma, gae_lambda: scalars.
      whiten_rewards: divide the token rewards by their deviation; their mean stays.
      whiten_advantages: to mean 0 and variance 1 over the whole batch.

    Returns: (advantages, returns), float32 [B, T], 0 outside the mask.
    """
    rewards = losses.kl_shaped_rewards(scores, logps, ref_logps, mask, beta=kl_coef)
    if whiten_rewards:
        rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = losses.gae(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    if whiten_advantages:
        advantages = losses.masked_whiten(advantages, mask)
    return advantages, jnp.where(mask, returns, 0.0)


def make_rollout(
    scored: Scored, scores: np.ndarray, kl_coef: float, ppo: PPOOptions
) -> Rollout:
    """The batch for the objectives. Host arrays."""
    assert scored.values is not None, "there is neither a critic nor a value head"
    advantages, returns = estimate_advantages(
        scores,
        scored.logps,
        scored.ref_logps,
        scored.values,
        scored.batch.completion_mask,
        kl_coef=kl_coef,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        whiten_rewards=ppo.rewards.whiten_rewards,
        whiten_advantages=ppo.whiten_advantages,
    )
    return Rollout(
        *scored.batch,
        old_logps=scored.logps,
        ref_logps=scored.ref_logps,
        values=scored.values,
        advantages=np.asarray(advantages),
        returns=np.asarray(returns),
        routing=scored.routing,
    )


def rollout_metrics(
    scored: Scored, scores: np.ndarray, kl_coef: float, ppo: PPOOptions
) -> dict[str, Any]:
    """Averages over the completions of a rollout, named as TRL's PPO names them.

    `objective/kl`, in nats a completion, is the sum of kl_k1 over its tokens;
    `objective/entropy` the sum of -log p. `objective/scores` is after clipping and
    penalty.
    """
    del ppo
    means, mask = common_metrics(scored), scored.batch.completion_mask
    assert scored.logps is not None, "the policy's pass was left out"
    gaps = np.abs(scored.logps - scored.sampler_logps)[mask]
    penalty = -kl_coef * means[ROLLOUT_KL]
    means |= {
        "objective/entropy": -np.where(mask, scored.logps, 0.0).sum(axis=1).mean(),
        "objective/non_score_reward": penalty,
        "objective/rlhf_reward": penalty + scores.mean(),
        "objective/scores": scores.mean(),
        "objective/kl_coef": kl_coef,
        "reward_std": scored.rewards.std(),
        "val/num_eos_tokens": scored.stopped.sum(),
        "sampling/sampling_logp_difference/max": np.max(gaps, initial=0.0),
    }
    if len(scored.reward_parts) > 1:
        for name, part in scored.reward_parts.items():
            means[f"rewards/{name}/mean"] = mean_of_judged(part)
    return means


def ratio_metrics(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How the ratio moved over the updates, and TRL's name of the learning rate."""
    ratios = found["val/ratio"]
    return {
        "lr": found["learning_rate"][-1],
        "val/ratio_var": ratios.var(ddof=1) if len(ratios) > 1 else 0.0,
        # 1 up to rounding, or sampling and training do not share one model.
        "val/ratio_first": ratios[0],
    }


PPO = Algorithm(
    "ppo",
    ppo_objectives,
    make_rollout,
    rollout_metrics,
    ratio_metrics,
    reads_logps=True,
)


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
      mask: bool [B, T], the completions; for advantages that read their lengths.
      options: group_size, and how they are scaled, or which loss says so.

    Returns: float32 [B]; statistics are over whole groups and the whole batch.
    """
    scale = {
        "group": losses.group_advantages,
        "none": functools.partial(losses.group_advantages, scale_by_std=False),
        "batch": _batch_scaled,
        "auto": options.entry.advantages,
    }[options.scale_rewards]
    assert scale is not None, "the registry has them for every policy loss"
    group_ids = np.arange(len(scores), dtype=np.int32) // options.group_size
    own = options.scale_rewards == "auto" and options.entry.token_mask
    counted = mask if own else np.ones(len(scores), bool)
    return np.asarray(scale(jnp.asarray(scores), group_ids, counted))


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
