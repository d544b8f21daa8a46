"""Objectives: what a training step differentiates, (params, batch, key) -> Loss.

Each one is a model's forward pass, functions of `jalign.losses`, a mask and a
reduction to (sum, count). The step sums both over micro-batches and devices and
divides once, so nothing here depends on how the batch was cut. Write a new one in the
same way; `key` is there for what needs randomness (these do not).
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jalign import losses
from jalign.forward import (
    hidden_states,
    logits_options,
    noting_routes,
    pair_logps,
    pair_rewards,
    pair_sums,
    rows_apart,
    rows_of,
    successors,
    valid_pairs,
)
from jalign.losses.chunked import sum_over_logits
from jalign.losses.logps import cap_logits
from jalign.models import Model
from jalign.types import Loss, PreferenceBatch, TokenBatch

PyTree = Any
Objective = Callable[[PyTree, Any, jax.Array], Loss]
Terms = Mapping[str, Callable[[Mapping[str, jax.Array]], jax.Array]]
"""Name -> function from the arrays of an objective, by name, to an unreduced loss."""


def with_router_loss(objective: Objective, model: Model, coef: float) -> Objective:
    """An objective that also keeps the experts of a mixture equally busy, and tells it.

    The mean loss grows by coef times `losses.load_balancing_loss`, of each micro-batch
    by itself; the metric is "aux_loss". Without experts it is the objective itself.

    Raises: ValueError for a coef without experts.
    """
    if model.config.experts is None:
        if coef:
            raise ValueError(
                f"router_aux_coef {coef}: {model.config.family} has no experts"
            )
        return objective

    def routed(params: PyTree, batch: Any, key: jax.Array) -> Loss:
        with noting_routes() as noted:
            loss = objective(params, batch, key)
        found = [losses.load_balancing_loss(r.load, r.probability) for r in noted]
        aux = sum(found[1:], found[0]) / len(found)
        metrics = {**loss.metrics, "aux_loss": (aux * loss.count, loss.count)}
        return Loss(loss.sum + coef * aux * loss.count, loss.count, metrics)

    return routed


def make_sft_objective(
    model: Model,
    *,
    terms: Terms | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Objective:
    """A loss of each trained token of a TokenBatch, by default the cross-entropy.

    Args:
      model: a causal language model (num_labels=0).
      terms: what to sum instead, functions of "logits" [b, s, V], "targets" and "logps"
        [b, s] to [b, s]: of a chunk of the tokens, since [B, T, V] never exists.
      label_smoothing: weight of the uniform distribution in the target, in [0, 1).
      z_loss: weight of log(Z)^2, which keeps the logits' scale down.

    Returns: objective whose count is the number of trained tokens.
    """
    if terms is None:
        terms = {"sft": functools.partial(_cross_entropy, label_smoothing, z_loss)}
    named = tuple(terms.items())

    def objective(params: PyTree, batch: TokenBatch, key: jax.Array) -> Loss:
        del key
        arrays = hidden_states(model, params, batch), *successors(batch)
        hidden, targets, mask = rows_apart(model, arrays)
        head = model.head(params)
        row_fn = functools.partial(_sft_rows, softcap=head.softcap, terms=named)
        total, (parts, nll, entropy, correct) = sum_over_logits(
            row_fn,
            head.inputs(hidden),
            head.unembed,
            targets,
            mask,
            **logits_options(model, hidden),
        )
        metrics = {
            "nll": losses.token_mean(nll, mask),
            "entropy": losses.token_mean(entropy, mask),
            "mean_token_accuracy": losses.token_mean(correct, mask),
        }
        metrics |= {name: losses.token_mean(x, mask) for name, x in parts.items()}
        return Loss(total, jnp.sum(mask, dtype=jnp.float32), metrics)

    return objective


def make_reward_objective(
    model: Model, *, terms: Terms | None = None, center_coef: float = 0.0
) -> Objective:
    """A loss of the scores of a PreferenceBatch's last tokens: Bradley-Terry's.

    Args:
      model: with a scalar head (num_labels=1).
      terms: what to sum instead, functions of "chosen_rewards", "rejected_rewards" and
        "margin", [N] each, to [N]; N is B * P, filler included.
      center_coef: weight of (chosen + rejected)^2, which keeps the mean reward of a
        pair near 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Returns: objective whose count is the number of pairs, filler left out.
    """
    if terms is None:
        terms = {"bradley_terry": _bradley_terry}
    if center_coef:
        terms = dict(terms) | {"center": functools.partial(_center, center_coef)}

    def objective(params: PyTree, batch: PreferenceBatch, key: jax.Array) -> Loss:
        del key
        chosen, rejected = map(jnp.ravel, pair_rewards(model, params, batch))
        inputs = {
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "margin": jnp.ravel(batch.margins),
        }
        loss, parts = sum_terms(terms, inputs)
        valid = jnp.ravel(valid_pairs(batch))
        metrics = {
            "accuracy": _mean(chosen > rejected, valid),
            "margin": _mean(chosen - rejected, valid),
            "mean_reward": _mean((chosen + rejected) / 2, valid),
            "min_reward": _extreme(jnp.minimum(chosen, rejected), valid, jnp.min),
            "max_reward": _extreme(jnp.maximum(chosen, rejected), valid, jnp.max),
        }
        metrics |= {name: _mean(x, valid) for name, x in parts.items()}
        return Loss(*_mean(loss, valid), metrics)

    return objective


def make_dpo_objective(
    model: Model,
    *,
    terms: Terms | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Objective:
    """A loss of pairs that carry their reference's log-probabilities, by default DPO's.

    Args:
      model: the policy, a causal language model.
      terms: what to sum instead, functions of the arrays of `pair_inputs` to [B * P].
      beta: strength of the implicit KL penalty; rewards are beta * log(policy/ref).
      label_smoothing: assumed share of flipped preferences, in [0, 0.5).

    Returns: objective whose count is the number of pairs, filler left out.
    """
    if terms is None:
        terms = {"dpo": functools.partial(_dpo, beta, label_smoothing)}

    def objective(params: PyTree, batch: PreferenceBatch, key: jax.Array) -> Loss:
        del key
        inputs = pair_inputs(model, params, batch)
        loss, parts = sum_terms(terms, inputs)
        valid = inputs["mask"]
        reward_chosen, reward_rejected = (
            losses.implicit_rewards(
                inputs[f"{side}_logps"], inputs[f"ref_{side}_logps"], beta=beta
            )
            for side in ("chosen", "rejected")
        )
        metrics = {
            "rewards/chosen": _mean(reward_chosen, valid),
            "rewards/rejected": _mean(reward_rejected, valid),
            "rewards/accuracies": _mean(reward_chosen > reward_rejected, valid),
            "rewards/margins": _mean(reward_chosen - reward_rejected, valid),
            "logps/chosen": _mean(inputs["chosen_logps"], valid),
            "logps/rejected": _mean(inputs["rejected_logps"], valid),
            "lengths/chosen": _mean(inputs["chosen_lengths"], valid),
            "lengths/rejected": _mean(inputs["rejected_lengths"], valid),
        }
        metrics |= {name: _mean(x, valid) for name, x in parts.items()}
        return Loss(*_mean(loss, valid), metrics)

    return objective


def pair_inputs(
    model: Model, params: PyTree, batch: PreferenceBatch
) -> dict[str, jax.Array]:
    """What a preference loss may read, by name, [B * P] each.

    Returns: {chosen,rejected}_logps, summed over the completion, and the same with
      ref_, average_ (over its tokens) and average_ref_ in front, float32, in nats;
      {chosen,rejected}_lengths, float32, the completion's trained tokens; `mask`, bool,
      False on filler.
    """
    trained = jnp.asarray(rows_of(batch).completion_mask, jnp.float32)
    inputs = {"mask": valid_pairs(batch)}
    for side, total, length, ref in zip(
        ("chosen", "rejected"),
        pair_logps(model, params, batch),
        pair_sums(trained, batch),
        (batch.ref_chosen_logps, batch.ref_rejected_logps),
        strict=True,
    ):
        inputs[f"{side}_lengths"] = length
        length = jnp.maximum(length, 1.0)
        inputs |= {
            f"{side}_logps": total,
            f"ref_{side}_logps": ref,
            f"average_{side}_logps": total / length,
            f"average_ref_{side}_logps": ref / length,
        }
    return {name: jnp.ravel(x) for name, x in inputs.items()}


def _mean(x: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, count) over the valid places."""
    kept = jnp.where(valid, x.astype(jnp.float32), 0.0)
    return jnp.sum(kept), jnp.sum(valid.astype(jnp.float32))


def _extreme(x, valid, reduce) -> tuple[jax.Array, jax.Array]:
    """(extreme, 1) over the valid places; the step merges min_* and max_* as such."""
    empty = jnp.inf if reduce is jnp.min else -jnp.inf
    return reduce(jnp.where(valid, x, empty)), jnp.float32(1.0)


def sum_terms(terms: Terms, inputs: Mapping[str, jax.Array]):
    """(sum of the terms, name -> each of several as a metric)."""
    parts = {name: term(inputs) for name, term in terms.items()}
    total = functools.reduce(operator.add, parts.values())
    if len(parts) == 1:
        return total, {}
    return total, {f"loss/{k}": jax.lax.stop_gradient(x) for k, x in parts.items()}


def _cross_entropy(label_smoothing: float, z_loss: float, inputs):
    return losses.cross_entropy(
        inputs["logits"],
        inputs["targets"],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def _bradley_terry(inputs):
    return losses.bradley_terry_loss(
        inputs["chosen_rewards"], inputs["rejected_rewards"], margin=inputs["margin"]
    )


def _center(coef: float, inputs):
    rewards = inputs["chosen_rewards"], inputs["rejected_rewards"]
    return coef * losses.reward_center_loss(*rewards)


def _dpo(beta: float, label_smoothing: float, inputs):
    names = "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"
    logps = (inputs[name] for name in names)
    return losses.dpo_loss(*logps, beta=beta, label_smoothing=label_smoothing)


def _sft_rows(logits, targets, *, softcap, terms):
    """A chunk's loss, and (its parts, nll, entropy, accuracy)."""
    logits = cap_logits(logits, softcap)
    logps = losses.logps_from_logits(logits, targets)
    inputs = {"logits": logits, "targets": targets, "logps": logps}
    loss, parts = sum_terms(dict(terms), inputs)
    logits, logps = jax.lax.stop_gradient((logits, logps))
    # Not argmax == target: over a vocabulary split over devices, a max is cheaper.
    best = jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    entropy = losses.entropy_from_logits(logits)
    return loss, (parts, -logps, entropy, (logps >= best).astype(jnp.float32))
