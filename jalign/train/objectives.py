"""Objectives: what a training step differentiates, (params, batch, key) -> Loss.

Each one is a model's forward pass, one function of `jalign.losses`, a mask and a
reduction to (sum, count). The step sums both over micro-batches and devices and
divides once, so nothing here depends on how the batch was cut. Write a new one in the
same way; `key` is there for what needs randomness (these do not).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jalign import losses
from jalign.models import Model
from jalign.train.forward import (
    chunk_size,
    hidden_states,
    interleave,
    sequence_rewards,
    split_pairs,
    token_logps,
    token_stats,
    token_values,
)
from jalign.types import Loss, PreferenceBatch, Rollout, TokenBatch

PyTree = Any
Objective = Callable[[PyTree, Any, jax.Array], Loss]


def make_sft_objective(
    model: Model, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Objective:
    """Next-token cross-entropy on the trained tokens of a TokenBatch.

    Args:
      model: a causal language model (num_labels=0).
      label_smoothing: weight of the uniform distribution in the target, in [0, 1).
      z_loss: weight of log(Z)^2, which keeps the logits' scale down.

    Returns: objective whose count is the number of trained tokens.
    """

    row_fn = functools.partial(
        _sft_rows, label_smoothing=label_smoothing, z_loss=z_loss
    )

    def objective(params: PyTree, batch: TokenBatch, key: jax.Array) -> Loss:
        del key
        loss, nll, entropy, correct = losses.map_logits(
            row_fn,
            hidden_states(model, params, batch)[:, :-1],
            model.unembed(params),
            batch.tokens[:, 1:],
            chunk_size=chunk_size(model),
        )
        mask = batch.completion_mask[:, 1:]
        metrics = {
            "nll": losses.token_mean(nll, mask),
            "entropy": losses.token_mean(entropy, mask),
            "mean_token_accuracy": losses.token_mean(correct, mask),
        }
        return Loss(*losses.token_mean(loss, mask), metrics)

    return objective


def make_reward_objective(model: Model, *, center_coef: float = 0.0) -> Objective:
    """Bradley-Terry loss on the scores of a PreferenceBatch's last tokens.

    Args:
      model: with a scalar head (num_labels=1).
      center_coef: weight of (chosen + rejected)^2, which keeps the mean reward of a
        pair near 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Returns: objective whose count is the number of pairs, filler rows left out.
    """

    def objective(params: PyTree, batch: PreferenceBatch, key: jax.Array) -> Loss:
        del key
        rewards = sequence_rewards(model, params, interleave(batch))
        chosen, rejected = split_pairs(rewards)
        loss = losses.bradley_terry_loss(chosen, rejected, margin=batch.margins)
        if center_coef:
            loss += center_coef * losses.reward_center_loss(chosen, rejected)
        valid = _valid_rows(batch)
        metrics = {
            "accuracy": _mean(chosen > rejected, valid),
            "margin": _mean(chosen - rejected, valid),
            "mean_reward": _mean((chosen + rejected) / 2, valid),
            "min_reward": _extreme(jnp.minimum(chosen, rejected), valid, jnp.min),
            "max_reward": _extreme(jnp.maximum(chosen, rejected), valid, jnp.max),
        }
        return Loss(*_mean(loss, valid), metrics)

    return objective


def make_dpo_objective(
    model: Model, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Objective:
    """Direct preference optimization on pairs that carry their reference's logps.

    Args:
      model: the policy, a causal language model.
      beta: strength of the implicit KL penalty; rewards are beta * log(policy/ref).
      label_smoothing: assumed share of flipped preferences, in [0, 0.5).

    Returns: objective whose count is the number of pairs, filler rows left out.
    """

    def objective(params: PyTree, batch: PreferenceBatch, key: jax.Array) -> Loss:
        del key
        rows = interleave(batch)
        logps = token_logps(model, params, rows)
        chosen, rejected = split_pairs(
            losses.sequence_logps(logps, rows.completion_mask)
        )
        loss = losses.dpo_loss(
            chosen,
            rejected,
            batch.ref_chosen_logps,
            batch.ref_rejected_logps,
            beta=beta,
            label_smoothing=label_smoothing,
        )
        valid = _valid_rows(batch)
        reward_chosen = losses.implicit_rewards(
            chosen, batch.ref_chosen_logps, beta=beta
        )
        reward_rejected = losses.implicit_rewards(
            rejected, batch.ref_rejected_logps, beta=beta
        )
        metrics = {
            "rewards/chosen": _mean(reward_chosen, valid),
            "rewards/rejected": _mean(reward_rejected, valid),
            "rewards/accuracies": _mean(reward_chosen > reward_rejected, valid),
            "rewards/margins": _mean(reward_chosen - reward_rejected, valid),
            "logps/chosen": _mean(chosen, valid),
            "logps/rejected": _mean(rejected, valid),
        }
        return Loss(*_mean(loss, valid), metrics)

    return objective


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


def _valid_rows(batch: PreferenceBatch) -> jax.Array:
    """bool [B], False on filler rows."""
    return jnp.any(batch.chosen.segment_ids > 0, axis=1)


def _mean(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) over the valid rows of [B]."""
    kept = jnp.where(valid, x.astype(jnp.float32), 0.0)
    return jnp.sum(kept), jnp.sum(valid.astype(jnp.float32))


def _extreme(x, valid, reduce) -> tuple[jax.Array, jax.Array]:
    """(extreme, 1) over the valid rows; the step merges min_* and max_* as such."""
    empty = jnp.inf if reduce is jnp.min else -jnp.inf
    return reduce(jnp.where(valid, x, empty)), jnp.float32(1.0)


def _sft_rows(logits, targets, _, *, label_smoothing, z_loss):
    """A chunk's loss (differentiated), nll, entropy and accuracy (not), from logits."""
    loss = losses.cross_entropy(
        logits, targets, label_smoothing=label_smoothing, z_loss=z_loss
    )
    logits = jax.lax.stop_gradient(logits)
    logps = losses.logps_from_logits(logits, targets)
    # Not argmax == target: over a vocabulary split over devices, a max is cheaper.
    best = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    entropy = losses.entropy_from_logits(logits)
    return loss, -logps, entropy, (logps >= best).astype(jnp.float32)
