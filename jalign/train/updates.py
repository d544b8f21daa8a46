"""One iteration of an online run: a rollout, then a few epochs of updates.

PPO and GRPO are two `Algorithm`s (ppo.py, grpo.py): what is learned, and how scored
completions become a Rollout. All else is shared, and here.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jalign import data, losses
from jalign.models import Model
from jalign.train.objectives import Objective, with_router_loss
from jalign.train.online_config import KLConfig, OnlineConfig, OnlineOptions, PPOOptions
from jalign.train.online_models import OnlineModels
from jalign.train.optim import OptimConfig
from jalign.train.policy_objectives import UPDATE_KL
from jalign.train.rollout import (
    ROLLOUT_KL,
    RolloutFunctions,
    Scored,
    sample_and_score,
    shape_scores,
)
from jalign.train.shapes import local_rows, minibatches
from jalign.train.step import init_state
from jalign.train.trained import Trainer, make_trainer
from jalign.types import PyTree, Rollout, TrainState

Rows = Sequence[Mapping[str, Any]]
"""The metrics of each update of an iteration, on the host."""


class Algorithm(NamedTuple):
    """What is particular to an online algorithm.

    Attributes:
      name: of the command.
      objectives: (models by name, options, optim) -> name -> its objective and its
        optimizer's config.
      rollout: (scored, scores [B], kl_coef, options) -> Rollout, with advantages.
      metrics: (scored, scores [B], kl_coef, options) -> name -> number.
      update_metrics: (name -> metric of each update [N]) -> what is told beside the
        means.
      reads_logps: whether a rollout needs the trainer's pass of the policy, however
        often it is learned from.
    """

    name: str
    objectives: Callable[..., dict[str, tuple[Objective, OptimConfig]]]
    rollout: Callable[[Scored, np.ndarray, float, Any], Rollout]
    metrics: Callable[[Scored, np.ndarray, float, Any], dict[str, Any]]
    update_metrics: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    reads_logps: bool


class OnlineState(NamedTuple):
    """All that changes in a run; saved together, or not at all.

    Attributes:
      models: "policy" and, where it is a model of its own, "critic" -> training state.
      kl_coef: the KL coefficient of the next rollout; 0 where rewards have none.
      iteration: rollouts done, which is also the position in the prompts.
    """

    models: dict[str, TrainState]
    kl_coef: float
    iteration: int

    @property
    def step(self) -> int:
        """The loop's count: iterations."""
        return self.iteration

    @property
    def params(self) -> PyTree:
        """Of the policy, which is what is measured and exported."""
        return self.models["policy"].params


def make_trainers(
    algorithm: Algorithm, models: OnlineModels, config: OnlineConfig, iterations: int
) -> dict[str, Trainer]:
    """Optimizers and compiled steps of "policy" and, where there is one, "critic"."""
    updates = iterations * config.options.updates_per_rollout
    shapes = jax.eval_shape(lambda: {n: p.params for n, p in models.parts.items()})
    leaves, structure = jax.tree.flatten(shapes)
    compute, dropout = config.compute, config.lora.lora_dropout
    how = updates, compute.microbatches, dropout, config.router_aux_coef
    named = tuple(models.models.items())
    given = algorithm, named, (structure, tuple(leaves)), config.options, config.optim
    return {
        name: trainer._replace(
            step=functools.partial(trainer.step, frozen=models.parts[name].frozen)
        )
        for name, trainer in _trainers(*given, *how).items()
    }


@functools.lru_cache(maxsize=4)
def _trainers(
    algorithm: Algorithm,
    named: tuple[tuple[str, Model], ...],
    flat: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]],
    options: OnlineOptions,
    optim: OptimConfig,
    updates: int,
    microbatches: int,
    dropout: float,
    router: float,
) -> dict[str, Trainer]:
    """Kept, so that a second run in one process (a notebook) compiles nothing; `flat`
    is the structure and the leaves of the shapes of what is trained."""
    models, shapes = dict(named), jax.tree.unflatten(*flat)
    names = {"policy": "the training step", "critic": "the critic's training step"}
    return {
        name: make_trainer(
            with_router_loss(objective, models[name], router),
            shapes[name],
            own_optim,
            mesh=models[name].mesh,
            updates=updates,
            microbatches=microbatches,
            dropout=dropout,
            name=names[name],
        )
        for name, (objective, own_optim) in algorithm.objectives(
            models, options, optim
        ).items()
    }


def start_state(
    models: OnlineModels, trainers: Mapping[str, Trainer], config: OnlineConfig
) -> OnlineState:
    """The state before the first rollout. Parameters are copied where another model may
    have them too (the reference, the critic, a reward model), else taken over."""
    states = {}
    keys = jax.random.split(jax.random.key(config.seed))
    for key, (name, trainer) in zip(keys, trainers.items(), strict=False):
        params = models.parts[name].params
        if config.has_reference or models.parts[name].frozen is not None:
            params = jax.tree.map(jnp.copy, params)
        mesh = models.models[name].mesh
        states[name] = init_state(params, trainer.tx, key, mesh=mesh)
    control = kl_control(config)
    return OnlineState(states, control.kl_coef if control else 0.0, 0)


def iterate(
    state: OnlineState,
    prompts: Sequence[data.PromptExample],
    *,
    algorithm: Algorithm,
    functions: RolloutFunctions,
    trainers: Mapping[str, Trainer],
    config: OnlineConfig,
    mesh: Mesh | None = None,
) -> tuple[OnlineState, dict[str, float]]:
    """One rollout and its updates. A pure function of the state, but for its clocks.

    Args:
      state: donated; continue with the returned one.
      prompts: all of them; the iteration number picks the batch.
      algorithm: whose iteration.
      functions: of make_functions, with the config's group_size.
      trainers: of make_trainers.
      config: the run's.
      mesh: the models'.

    Returns: the next state and this iteration's metrics.
    """
    began, number = time.perf_counter(), state.iteration
    options: Any = config.options
    chosen, key = rollout_prompts(prompts, config, number)
    params = {name: model.params for name, model in state.models.items()}
    # At the only update the policy is still the one that sampled.
    with_logps = algorithm.reads_logps or options.updates_per_rollout > 1
    scored = sample_and_score(functions, params, chosen, key, with_logps=with_logps)
    scores = shape_scores(scored.rewards, scored.stopped, options.rewards)
    given = scored, scores, state.kl_coef, options
    rollout = algorithm.rollout(*given)
    sampled = time.perf_counter()
    metrics = {name: float(x) for name, x in algorithm.metrics(*given).items()}
    models, rows = update(
        state,
        rollout,
        trainers=trainers,
        config=config,
        mesh=mesh,
        row_lengths=functions.row_lengths,
        kl=metrics.get(ROLLOUT_KL),
    )
    metrics = over_updates(rows, algorithm) | metrics
    metrics |= loop_metrics(rollout, config, number, began, sampled)
    kl_coef = next_kl_coef(state.kl_coef, metrics.get(ROLLOUT_KL, 0.0), config)
    return OnlineState(models, kl_coef, number + 1), metrics


def rollout_prompts(
    prompts: Sequence[data.PromptExample], config: OnlineConfig, iteration: int
) -> tuple[list[data.PromptExample], jax.Array]:
    """The prompts of an iteration, and the key of its sampling."""
    chosen = data.batch_indices(len(prompts), config.batch_size, config.seed, iteration)
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return [prompts[i] for i in chosen], key


def update(
    state: OnlineState,
    rollout: Rollout,
    *,
    trainers: Mapping[str, Trainer],
    config: OnlineConfig,
    mesh: Mesh | None,
    row_lengths: Sequence[int] = (),
    kl: float | None = None,
) -> tuple[dict[str, TrainState], Rows]:
    """num_epochs passes over a rollout in num_minibatches parts, anew shuffled.

    With stop_kl they end where the policy is beyond it: none are taken where `kl` is,
    the rollout's own (nats a completion; None without a reference).

    Returns: the models' states, and the metrics of each update. Where a metric of the
      critic is called as one of the policy, it is critic/... .
    """
    models, rows, limit = dict(state.models), [], config.stop_kl
    if limit is not None and kl is not None and kl > limit:
        return models, rows
    for part in minibatches(rollout, config, state.iteration, row_lengths):
        batch, row = local_rows(part, mesh), {}
        for name, trainer in trainers.items():
            models[name], found = trainer.step(models[name], batch)
            row |= {f"{name}/{k}" if k in row else k: x for k, x in found.items()}
        rows.append(row)
        # Without a limit the host does not wait for the device in between.
        if limit is not None and float(row[UPDATE_KL]) > limit:
            break
    return models, jax.device_get(rows)


def over_updates(rows: Rows, algorithm: Algorithm) -> dict[str, float]:
    """Means over the updates of an iteration, the last learning rate, how many were
    skipped, and what the algorithm tells; min_* and max_* are for it alone."""
    if not rows:
        return {}
    found = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    means = {k: x.mean() for k, x in found.items() if k[:4] not in ("min_", "max_")}
    means["skipped"] = sum(x.sum() for k, x in found.items() if k.endswith("skipped"))
    means["learning_rate"] = found["learning_rate"][-1]
    means |= algorithm.update_metrics(found)
    return {name: float(x) for name, x in means.items()}


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


def kl_control(config: OnlineConfig) -> KLConfig | None:
    """How the KL is held inside the rewards; None where it is not."""
    return config.options.kl if isinstance(config.options, PPOOptions) else None


def next_kl_coef(kl_coef: float, kl: float, config: OnlineConfig) -> float:
    """The coefficient of the next rollout: adapted where a target is set."""
    control = kl_control(config)
    if control is None or control.kl_target is None:
        return kl_coef
    new = losses.adaptive_kl_update(
        kl_coef,
        kl,
        target=control.kl_target,
        horizon=control.kl_horizon,
        num_samples=config.batch_size,
    )
    return float(new)
