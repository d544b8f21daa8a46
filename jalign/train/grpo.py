"""One iteration of GRPO and its relatives: groups of completions, then updates.

No critic: a completion's baseline are the other completions of its prompt. After Shao
et al. 2024 (arXiv:2402.03300); the variants differ in the loss of a token, in what the
advantages are divided by, and in how tokens are averaged (`train.loss_table`).
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jalign import data
from jalign.models import Model
from jalign.train.actors import Cast, local_rows
from jalign.train.group_rollout import group_metrics, make_group_rollout
from jalign.train.online_config import GRPOConfig, GRPOOptions
from jalign.train.optim import OptimConfig
from jalign.train.policy_objectives import make_grpo_objective
from jalign.train.rollout import (
    ROLLOUT_KL,
    Actors,
    sample_and_score,
    shape_scores,
)
from jalign.train.updates import (
    Learner,
    columns,
    first_state,
    loop_metrics,
    make_trainer,
    minibatches,
    num_updates,
    rollout_prompts,
    take_updates,
)
from jalign.types import Rollout, TrainState


class GRPOState(NamedTuple):
    """All that changes in a run; saved together, or not at all.

    Attributes:
      policy: its training state.
      iteration: rollouts done, which is also the position in the prompts.
    """

    policy: TrainState
    iteration: int


def make_learner(cast: Cast, config: GRPOConfig, iterations: int) -> Learner:
    """Optimizer and compiled step of "policy"."""
    updates = num_updates(config, iterations)
    how = config.optim, config.grpo, updates, config.compute.microbatches
    return _learner(cast.policy, *how)


@functools.lru_cache(maxsize=4)
def _learner(
    policy: Model,
    optim: OptimConfig,
    grpo: GRPOOptions,
    updates: int,
    microbatches: int,
) -> Learner:
    """Kept, so that a second run in one process (a notebook) compiles nothing."""
    objective = make_grpo_objective(
        policy,
        terms=grpo.terms(),
        reduction=grpo.reduction,
        beta=grpo.beta,
        entropy_coef=grpo.entropy_coef,
        temperature=grpo.sampling.temperature,
    )
    trainer = make_trainer(
        objective, policy, optim, updates=updates, microbatches=microbatches
    )
    return {"policy": trainer}


def start_state(cast: Cast, learner: Learner, config: GRPOConfig) -> GRPOState:
    """The state before the first rollout. The cast's parameters are copied where they
    are the reference's too, else taken over."""
    policy = first_state(
        cast.policy,
        cast.policy_params,
        learner["policy"],
        jax.random.key(config.seed),
        keep=config.has_reference,
    )
    return GRPOState(policy, 0)


def iterate(
    state: GRPOState,
    prompts: Sequence[data.PromptExample],
    *,
    actors: Actors,
    learner: Learner,
    config: GRPOConfig,
    mesh: Mesh | None = None,
) -> tuple[GRPOState, dict[str, float]]:
    """One rollout and its updates. A pure function of the state, but for its clocks.

    Args:
      state: donated; continue with the returned one.
      prompts: all of them; the iteration number picks the batch.
      actors: of make_actors, with the config's group_size.
      learner: of make_learner.
      config: the run's.
      mesh: the model's.

    Returns: the next state and this iteration's metrics.
    """
    grpo, began, number = config.grpo, time.perf_counter(), state.iteration
    chosen, key = rollout_prompts(prompts, config, number)
    # At the only update the policy is still the one that sampled.
    several = grpo.updates_per_rollout > 1
    scored = sample_and_score(
        actors, state.policy.params, chosen, key, with_logps=several
    )
    scores = shape_scores(scored.rewards, scored.stopped, grpo.rewards)
    rollout = make_group_rollout(scored, scores, grpo)
    sampled = time.perf_counter()
    metrics = group_metrics(scored, scores, grpo.group_size)
    how: dict[str, Any] = {"learner": learner, "config": config, "mesh": mesh}
    how |= {"row_lengths": actors.row_lengths, "kl": metrics.get(ROLLOUT_KL)}
    policy, more = update(state, rollout, **how)
    metrics = more | metrics
    metrics |= loop_metrics(rollout, config, number, began, sampled)
    return GRPOState(policy, number + 1), metrics


def update(
    state: GRPOState,
    rollout: Rollout,
    *,
    learner: Learner,
    config: GRPOConfig,
    mesh: Mesh | None,
    row_lengths: Sequence[int] = (),
    kl: float | None = None,
) -> tuple[TrainState, dict[str, float]]:
    """num_epochs passes over a rollout in num_minibatches parts, anew shuffled.

    With stop_kl they end where the policy is beyond it; kl is where it began.

    Returns: the policy's state, and the metrics' means over the updates.
    """
    policy = state.policy

    def one(part: Rollout) -> Mapping[str, Any]:
        nonlocal policy
        policy, metrics = learner["policy"].step(policy, local_rows(part, mesh))
        return metrics

    parts = minibatches(rollout, config, state.iteration, row_lengths)
    rows = take_updates(one, parts, kl=kl, stop_kl=config.stop_kl)
    return policy, update_metrics(rows)


def update_metrics(rows: Sequence[Mapping]) -> dict[str, float]:
    """Means over the updates of an iteration; of some their extremes."""
    if not rows:
        return {}
    found = columns(rows)
    extremes = sampling_extremes(
        found.pop("min_sampler_gap").min(), found.pop("max_sampler_gap").max()
    )
    return {name: float(x.mean()) for name, x in found.items()} | {
        "skipped": float(found["skipped"].sum()),
        "learning_rate": float(found["learning_rate"][-1]),
        "clip_ratio/low_min": float(found["clip_ratio/low_mean"].min()),
        "clip_ratio/high_max": float(found["clip_ratio/high_mean"].max()),
        # 1 up to rounding, or the pass and the update do not share one model.
        "ratio_first": float(found["ratio"][0]),
        **extremes,
    }


def sampling_extremes(low: float, high: float) -> dict[str, float]:
    """Extremes of trainer's less sampler's log-probability, under TRL's names.

    Args:
      low, high: the signed extremes, nats; inf and -inf where no token was trained,
        which count as 0.
    """
    low, high = (0.0, 0.0) if low > high else (low, high)
    return {
        "sampling/sampling_logp_difference/max": float(max(high, -low)),
        "sampling/importance_sampling_ratio/min": float(np.exp(low)),
        "sampling/importance_sampling_ratio/max": float(np.exp(high)),
    }
