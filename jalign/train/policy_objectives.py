"""The objectives of PPO's two models, on a Rollout."""

import jax
import jax.numpy as jnp

from jalign import losses
from jalign.models import Model
from jalign.train.forward import token_stats, token_values
from jalign.train.objectives import Objective, PyTree
from jalign.types import Loss, Rollout


def make_ppo_objective(
    model: Model,
    *,
    clip_eps: float = 0.2,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
) -> Objective:
    """PPO's clipped policy loss on a Rollout, a mean over all trained tokens.

    Args:
      model: the policy.
      clip_eps: the ratio to the policy at rollout time is clipped to 1 +- clip_eps.
      entropy_coef: weight of the entropy bonus.
      temperature: the sampler's; old_logps must have been taken at the same one.

    Returns: objective whose count is the number of trained tokens.
    """

    def objective(params: PyTree, batch: Rollout, key: jax.Array) -> Loss:
        del key
        mask = batch.completion_mask
        stats = token_stats(model, params, batch, temperature=temperature)
        policy = losses.ppo_policy_loss(
            stats.logps, batch.old_logps, batch.advantages, clip_eps=clip_eps
        )
        loss = policy - entropy_coef * stats.entropy if entropy_coef else policy
        args = (stats.logps, batch.old_logps)
        ratio = jnp.exp(jax.lax.stop_gradient(stats.logps) - batch.old_logps)
        clipped = losses.clip_frac(*args, batch.advantages, clip_eps=clip_eps)
        metrics = {
            "loss/policy_avg": losses.token_mean(policy, mask),
            "policy/approxkl_avg": losses.token_mean(losses.approx_kl(*args), mask),
            "policy/clipfrac_avg": losses.token_mean(clipped, mask),
            "policy/entropy_avg": losses.token_mean(stats.entropy, mask),
            "val/ratio": losses.token_mean(ratio, mask),
        }
        return Loss(*losses.token_mean(loss, mask), metrics)

    return objective


def make_value_objective(model: Model, *, clip_eps: float = 0.2) -> Objective:
    """PPO's clipped value loss on a Rollout, a mean over all trained tokens.

    Args:
      model: the critic, with a scalar head.
      clip_eps: values may move this far from those at rollout time.

    Returns: objective whose count is the number of trained tokens.
    """

    def objective(params: PyTree, batch: Rollout, key: jax.Array) -> Loss:
        del key
        mask = batch.completion_mask
        values = token_values(model, params, batch)
        loss = losses.ppo_value_loss(
            values, batch.values, batch.returns, clip_eps=clip_eps
        )
        moved = jnp.abs(jax.lax.stop_gradient(values) - batch.values)
        total, count = losses.token_mean(loss, mask)
        metrics = {
            "loss/value_avg": (jax.lax.stop_gradient(total), count),
            "val/clipfrac_avg": losses.token_mean(
                (moved > clip_eps).astype(jnp.float32), mask
            ),
        }
        return Loss(total, count, metrics)

    return objective
