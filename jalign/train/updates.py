"""What the updates of PPO and GRPO share: steps, minibatches, and their metrics."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jalign import data, sharding
from jalign.models import Model
from jalign.train.objectives import Objective
from jalign.train.online_config import OnlineConfig
from jalign.train.optim import OptimConfig, make_optimizer
from jalign.train.policy_objectives import UPDATE_KL
from jalign.train.shapes import cut
from jalign.train.step import TrainStep, abstract_state, init_state, make_train_step
from jalign.types import PyTree, Rollout, TrainState


class Trainer(NamedTuple):
    """How a run updates one of its models.

    Attributes:
      step: of make_train_step.
      tx: its optax transformation.
    """

    step: TrainStep
    tx: optax.GradientTransformation


Learner = Mapping[str, Trainer]
"""Name of a model in the cast -> its trainer."""


def make_trainer(
    objective: Objective,
    model: Model,
    optim: OptimConfig,
    *,
    updates: int,
    microbatches: int,
    name: str = "the training step",
) -> Trainer:
    """The optimizer and the compiled step of a model; the schedule runs over `updates`.

    The new state is pinned to the layout of the old one. `name` is the step's.
    """
    tx, schedule = make_optimizer(optim, updates)
    shapes = abstract_state(model.param_shapes(), tx, mesh=model.mesh)
    shardings = None
    if model.mesh is not None:
        shardings = sharding.state_shardings(model.mesh, shapes)
    step = make_train_step(
        objective,
        tx,
        microbatches=microbatches,
        state_shardings=shardings,
        schedule=schedule,
        name=name,
    )
    return Trainer(step, tx)


def num_updates(config: OnlineConfig, iterations: int) -> int:
    """Optimizer steps of a whole run."""
    return iterations * config.options.updates_per_rollout


def first_state(
    model: Model, params: PyTree, trainer: Trainer, key: jax.Array, *, keep: bool
) -> TrainState:
    """The state before the first update.

    Args:
      model, params, trainer: whose.
      key: PRNG key [].
      keep: copy the parameters; else they are taken over and gone after a step.
    """
    if keep:
        params = jax.tree.map(jnp.copy, params)
    return init_state(params, trainer.tx, key, mesh=model.mesh)


def rollout_prompts(
    prompts: Sequence[data.PromptExample], config: OnlineConfig, iteration: int
) -> tuple[list[data.PromptExample], jax.Array]:
    """The prompts of an iteration, and the key of its sampling."""
    chosen = data.batch_indices(len(prompts), config.batch_size, config.seed, iteration)
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return [prompts[i] for i in chosen], key


def minibatches(
    rollout: Rollout,
    config: OnlineConfig,
    iteration: int,
    row_lengths: Sequence[int] = (),
) -> Iterator[Rollout]:
    """num_epochs passes over a rollout in num_minibatches parts, anew shuffled, each
    cut to the first of the row lengths that holds it."""
    lengths = row_lengths or rollout.tokens.shape[1:]
    for epoch in range(config.options.num_epochs):
        random = np.random.default_rng([config.seed, iteration, epoch])
        order = random.permutation(config.completions)
        for part in np.split(order, config.options.num_minibatches):
            yield cut(jax.tree.map(lambda x, part=part: x[part], rollout), lengths)


def take_updates(
    update: Callable[[Rollout], Mapping[str, Any]],
    parts: Iterable[Rollout],
    *,
    kl: float | None = None,
    stop_kl: float | None = None,
) -> list[Mapping[str, Any]]:
    """Updates on the minibatches of a rollout, up to stop_kl where there is one.

    Args:
      update: takes a minibatch, gives its metrics; UPDATE_KL among them is the KL from
        the reference, nats a completion, before the update.
      parts: of minibatches.
      kl: the rollout's own, of the policy that sampled it; None without a reference.
      stop_kl: nats; None takes all updates.

    Returns: the metrics of each update, on the host; none where kl is beyond.
    """
    rows: list[Mapping[str, Any]] = []
    if stop_kl is not None and kl is not None and kl > stop_kl:
        return rows
    for part in parts:
        rows.append(update(part))
        # Without a limit the host does not wait for the device in between.
        if stop_kl is not None and float(rows[-1][UPDATE_KL]) > stop_kl:
            break
    return jax.device_get(rows)


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Name -> the metric of each update of an iteration, float64 [N]."""
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def loop_metrics(
    rollout: Rollout, config: OnlineConfig, iteration: int, began: float, sampled: float
) -> dict[str, float]:
    """Tokens, completions so far, and times; call it when the updates are done.

    Args:
      rollout: of this iteration.
      config: the run's.
      iteration: its number, from 0.
      began, sampled: time.perf_counter() before and after the rollout.
    """
    done = time.perf_counter()
    return {
        "num_tokens": float(np.sum(rollout.segment_ids > 0)),
        "episode": float((iteration + 1) * config.completions),
        "eps": config.completions / (done - began),
        "time/rollout": sampled - began,
        "time/update": done - sampled,
    }
