"""PPO: what is particular to it.

Separate models and optimizers, as in Ouyang et al. 2022 (arXiv:2203.02155), or, with
shared_trunk, two heads of one model, as in Schulman et al. 2017 (arXiv:1707.06347,
eq. 9). Details after Huang et al. 2024 (arXiv:2403.17031).
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import losses
from jalign.models import Model
from jalign.rewards import mean_of_judged
from jalign.train.objectives import Objective
from jalign.train.online_config import PPOOptions
from jalign.train.optim import OptimConfig
from jalign.train.policy_objectives import make_ppo_objective, make_value_objective
from jalign.train.rollout import ROLLOUT_KL, Scored, common_metrics
from jalign.train.updates import Algorithm
from jalign.types import Rollout


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
