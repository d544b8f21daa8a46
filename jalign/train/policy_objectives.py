"""The objectives of online runs, on a Rollout: policies, and PPO's critic."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jalign import losses
from jalign.forward import token_stats, token_values
from jalign.models import Model
from jalign.train.objectives import Objective, PyTree, Terms, sum_terms
from jalign.types import Array, Loss, Rollout

UPDATE_KL = "objective/kl_update"


def make_ppo_objective(
    model: Model,
    *,
    clip_eps: float = 0.2,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    value_coef: float = 0.1,
    value_clip_eps: float = 0.2,
) -> Objective:
    """PPO's clipped policy loss on a Rollout, a mean over all trained tokens.

    A policy with a value head adds value_coef times PPO's clipped value loss, from the
    same forward pass.

    Args:
      model: the policy.
      clip_eps: the ratio to the policy at rollout time is clipped to 1 +- clip_eps.
      entropy_coef: weight of the entropy bonus.
      temperature: the sampler's; old_logps must have been taken at the same one.
      value_coef, value_clip_eps: of the value head, see `make_value_objective`.

    Returns: objective whose count is the number of trained tokens.
    """

    def objective(params: PyTree, batch: Rollout, key: jax.Array) -> Loss:
        del key
        mask = batch.completion_mask
        stats = token_stats(model, params, batch, temperature=temperature)
        args = (stats.logps, old_logps(batch, stats.logps))
        policy = losses.ppo_policy_loss(*args, batch.advantages, clip_eps=clip_eps)
        loss = policy - entropy_coef * stats.entropy if entropy_coef else policy
        ratio = jnp.exp(jax.lax.stop_gradient(stats.logps) - args[1])
        clipped = losses.clip_frac(*args, batch.advantages, clip_eps=clip_eps)
        metrics = {
            "loss/policy_avg": losses.token_mean(policy, mask),
            "policy/approxkl_avg": losses.token_mean(losses.approx_kl(*args), mask),
            "policy/clipfrac_avg": losses.token_mean(clipped, mask),
            "policy/entropy_avg": losses.token_mean(stats.entropy, mask),
            "val/ratio": losses.token_mean(ratio, mask),
        }
        metrics |= _kl_now(*args, batch)
        if stats.values is not None:
            value, more = _value_loss(stats.values, batch, value_clip_eps)
            loss, metrics = loss + value_coef * value, metrics | more
        return Loss(*losses.token_mean(loss, mask), metrics)

    return objective


def make_grpo_objective(
    model: Model,
    *,
    terms: Terms,
    reduction: Callable[..., tuple[jax.Array, jax.Array]] = losses.token_mean,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
) -> Objective:
    """A policy loss on a Rollout whose advantages are there already: GRPO's family.

    Args:
      model: the policy.
      terms: what to sum, functions of "logps", "old_logps", "advantages" and "mask",
        [B, T] each, to [B, T].
      reduction: (x [B, T], mask) -> (sum, count), of losses and KL alike.
      beta: weight of the KL to the reference (kl_k3); with 0 ref_logps may be None.
      entropy_coef: weight of the entropy bonus.
      temperature: the sampler's; old_logps must have been taken at the same one.

    Returns: objective whose count is that of the reduction. With sampler_logps in the
      Rollout its metrics say how far trainer and sampler were apart at rollout time.
    """

    def objective(params: PyTree, batch: Rollout, key: jax.Array) -> Loss:
        del key
        mask = batch.completion_mask
        stats = token_stats(model, params, batch, temperature=temperature)
        old = old_logps(batch, stats.logps)
        inputs = {
            "logps": stats.logps,
            "old_logps": old,
            "advantages": batch.advantages,
            "mask": mask,
        }
        policy, parts = sum_terms(terms, inputs)
        loss, metrics = policy, {"entropy": losses.token_mean(stats.entropy, mask)}
        metrics |= _kl_now(stats.logps, old, batch)
        if beta:
            kl = losses.kl_k3(stats.logps, batch.ref_logps)
            loss = loss + beta * kl
            metrics["kl"] = losses.token_mean(kl, mask)
        if entropy_coef:
            loss = loss - entropy_coef * stats.entropy
        approx_kl = losses.approx_kl(stats.logps, old)
        metrics |= {
            "policy_loss": reduction(policy, mask),
            "ratio": losses.token_mean(jnp.exp(stats.logps - old), mask),
            "approx_kl": losses.token_mean(approx_kl, mask),
        }
        if batch.sampler_logps is not None:
            metrics |= sampler_gaps(old, batch.sampler_logps, mask)
        metrics |= {name: reduction(x, mask) for name, x in parts.items()}
        metrics |= clip_ratios(lambda x: sum_terms(terms, x)[0], inputs)
        total, count = reduction(loss, mask)
        return Loss(total, count, jax.lax.stop_gradient(metrics))

    return objective


def old_logps(batch: Rollout, logps: jax.Array) -> jax.Array:
    """The rollout's, else the objective's own [B, T], without their gradient."""
    chosen = logps if batch.old_logps is None else batch.old_logps
    return jax.lax.stop_gradient(jnp.asarray(chosen))


def _kl_now(
    logps: jax.Array, old: jax.Array, batch: Rollout
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """KL of the policy as it is to the reference, nats a completion, (sum, count).

    kl_k1 on the rollout's tokens, each weighted by its ratio to the policy that sampled
    it: before the first update it is the rollout's own.
    """
    if batch.ref_logps is None:
        return {}
    logps, mask = jax.lax.stop_gradient(logps), batch.completion_mask
    kl = jnp.exp(logps - old) * losses.kl_k1(logps, batch.ref_logps)
    completions = jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)
    return {UPDATE_KL: (jnp.sum(kl, where=mask), completions)}


def sampler_gaps(
    logps: Array, sampler_logps: Array, mask: Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How far trainer and sampler are apart on the trained tokens; ratios are e^gap.

    Args:
      logps, sampler_logps: float32 [B, T], nats, of the same policy.
      mask: bool [B, T].

    Returns: name -> (sum, count); of the two signed extremes (extreme, 1), inf where
      no token is trained. `grpo.update_extremes` gives them TRL's names.
    """
    gaps = logps - sampler_logps
    one = jnp.float32(1.0)
    return {
        "sampling/sampling_logp_difference/mean": losses.token_mean(abs(gaps), mask),
        "sampling/importance_sampling_ratio/mean": losses.token_mean(
            jnp.exp(gaps), mask
        ),
        "min_sampler_gap": (jnp.min(gaps, where=mask, initial=jnp.inf), one),
        "max_sampler_gap": (jnp.max(gaps, where=mask, initial=-jnp.inf), one),
    }


def clip_ratios(
    policy: Callable[[dict[str, jax.Array]], jax.Array], inputs: dict[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Shares of tokens that a policy loss gives no gradient though A is not 0.

    Read off the gradient, so that it is right for any loss: clipped by token or by
    sequence, or never.

    Args:
      policy: from the named arrays, [B, T] each, to the loss of each token.
      inputs: "logps", "advantages" and "mask" among them.

    Returns: TRL's names -> (sum, count); low where A < 0, high where A > 0.
    """
    inputs = jax.lax.stop_gradient(inputs)
    mask, advantages = inputs["mask"], inputs["advantages"]

    def total(logps):
        return losses.token_mean(policy(inputs | {"logps": logps}), mask)[0]

    idle = jax.grad(total)(inputs["logps"]) == 0
    where = {
        "clip_ratio/low_mean": idle & (advantages < 0),
        "clip_ratio/high_mean": idle & (advantages > 0),
        "clip_ratio/region_mean": idle & (advantages != 0),
    }
    return {k: losses.token_mean(x.astype(jnp.float32), mask) for k, x in where.items()}


def make_value_objective(model: Model, *, clip_eps: float = 0.2) -> Objective:
    """PPO's clipped value loss on a Rollout, a mean over all trained tokens.

    Args:
      model: the critic, with a scalar head.
      clip_eps: values may move this far from those at rollout time.

    Returns: objective whose count is the number of trained tokens.
    """

    def objective(params: PyTree, batch: Rollout, key: jax.Array) -> Loss:
        del key
        # The rollout's routes are the policy's.
        values = token_values(model, params, batch._replace(routing=None))
        loss, metrics = _value_loss(values, batch, clip_eps)
        return Loss(*losses.token_mean(loss, batch.completion_mask), metrics)

    return objective


def _value_loss(values: jax.Array, batch: Rollout, clip_eps: float):
    """-> the clipped loss of each token's value, [B, T], and its metrics."""
    assert batch.values is not None, "the rollout has no values"
    mask, old = batch.completion_mask, batch.values
    loss = losses.ppo_value_loss(values, old, batch.returns, clip_eps=clip_eps)
    moved = jnp.abs(jax.lax.stop_gradient(values) - old) > clip_eps
    return loss, {
        "loss/value_avg": losses.token_mean(jax.lax.stop_gradient(loss), mask),
        "val/clipfrac_avg": losses.token_mean(moved.astype(jnp.float32), mask),
    }
