"""One iteration of PPO: a rollout, then a few epochs of policy and critic updates.

Separate models and optimizers, as in Ouyang et al. 2022 (arXiv:2203.02155), or, with
shared_trunk, two heads of one model, as in Schulman et al. 2017 (arXiv:1707.06347, eq.
9). Details after Huang et al. 2024 (arXiv:2403.17031).
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jalign import data, losses
from jalign.models import Model
from jalign.train.actors import Cast, load_cast, local_rows
from jalign.train.online_config import PPOConfig, PPOOptions
from jalign.train.optim import OptimConfig
from jalign.train.policy_objectives import make_ppo_objective, make_value_objective
from jalign.train.rollout import (
    ROLLOUT_KL,
    Actors,
    make_rollout,
    rollout_metrics,
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


class PPOState(NamedTuple):
    """All that changes in a run; saved together, or not at all.

    Attributes:
      policy: its training state.
      kl_coef: the KL coefficient of the next rollout.
      iteration: rollouts done, which is also the position in the prompts.
      critic: its training state; None where it is a head of the policy.
    """

    policy: TrainState
    kl_coef: float
    iteration: int
    critic: TrainState | None = None


def choose_cast(config: PPOConfig, *args: Any) -> Cast:
    """`load_cast` with a critic or, with shared_trunk, a value head."""
    return load_cast(config, *args, value_head=config.ppo.critic.shared_trunk)


def make_learner(cast: Cast, config: PPOConfig, iterations: int) -> Learner:
    """Optimizers and compiled steps of "policy" and, where there is one, "critic"."""
    updates = num_updates(config, iterations)
    how = config.optim, config.ppo, updates, config.compute.microbatches
    return _learner(cast.policy, cast.critic, *how)


@functools.lru_cache(maxsize=4)
def _learner(
    policy: Model,
    critic: Model | None,
    optim: OptimConfig,
    ppo: PPOOptions,
    updates: int,
    microbatches: int,
) -> Learner:
    """Kept, so that a second run in one process (a notebook) compiles nothing."""
    rate = ppo.critic.critic_learning_rate
    critic_optim = optim if rate is None else replace(optim, learning_rate=rate)
    policy_objective = make_ppo_objective(
        policy,
        clip_eps=ppo.clip_eps,
        entropy_coef=ppo.entropy_coef,
        temperature=ppo.sampling.temperature,
        value_coef=ppo.critic.value_coef or 0.1,
        value_clip_eps=ppo.critic.value_clip_eps,
    )
    how: dict[str, Any] = {"updates": updates, "microbatches": microbatches}
    learner = {"policy": make_trainer(policy_objective, policy, optim, **how)}
    if critic is not None:
        objective = make_value_objective(critic, clip_eps=ppo.critic.value_clip_eps)
        how |= {"name": "the critic's training step"}
        learner["critic"] = make_trainer(objective, critic, critic_optim, **how)
    return learner


def start_state(cast: Cast, learner: Learner, config: PPOConfig) -> PPOState:
    """The state before the first rollout; the cast's parameters are copied."""
    keys = jax.random.split(jax.random.key(config.seed))
    start = functools.partial(first_state, keep=True)
    policy = start(cast.policy, cast.policy_params, learner["policy"], keys[0])
    critic = None
    if cast.critic is not None:
        critic = start(cast.critic, cast.critic_params, learner["critic"], keys[1])
    return PPOState(policy, config.ppo.kl.kl_coef, 0, critic)


def iterate(
    state: PPOState,
    prompts: Sequence[data.PromptExample],
    *,
    actors: Actors,
    learner: Learner,
    config: PPOConfig,
    mesh: Mesh | None = None,
) -> tuple[PPOState, dict[str, float]]:
    """One rollout and its updates. A pure function of the state, but for its clocks.

    Args:
      state: donated; continue with the returned one.
      prompts: all of them; the iteration number picks the batch.
      actors, learner: of make_actors and make_learner.
      config: the run's.
      mesh: the models'.

    Returns: the next state and this iteration's metrics.
    """
    ppo, began, number = config.ppo, time.perf_counter(), state.iteration
    chosen, key = rollout_prompts(prompts, config, number)
    scored = sample_and_score(actors, state.policy.params, chosen, key)
    scores = shape_scores(scored.rewards, scored.stopped, ppo.rewards)
    values = scored.values
    if state.critic is not None:
        assert actors.critic is not None
        values = actors.critic(state.critic.params, scored.batch)
    assert values is not None, "there is neither a critic nor a value head"
    rollout = make_rollout(
        scored,
        scores,
        values,
        kl_coef=state.kl_coef,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        whiten_rewards=ppo.rewards.whiten_rewards,
        whiten_advantages=ppo.whiten_advantages,
    )
    sampled = time.perf_counter()
    metrics = rollout_metrics(scored, scores, kl_coef=state.kl_coef)
    how: dict[str, Any] = {"learner": learner, "config": config, "mesh": mesh}
    how |= {"row_lengths": actors.row_lengths, "kl": metrics[ROLLOUT_KL]}
    policy, critic, more = update(state, rollout, **how)
    metrics = more | metrics
    metrics |= loop_metrics(rollout, config, number, began, sampled)
    kl_coef = next_kl_coef(state.kl_coef, metrics[ROLLOUT_KL], config)
    return PPOState(policy, kl_coef, number + 1, critic), metrics


def next_kl_coef(kl_coef: float, kl: float, config: PPOConfig) -> float:
    """The coefficient of the next rollout: adapted where a target is set."""
    options = config.ppo.kl
    if options.kl_target is None:
        return kl_coef
    new = losses.adaptive_kl_update(
        kl_coef,
        kl,
        target=options.kl_target,
        horizon=options.kl_horizon,
        num_samples=config.batch_size,
    )
    return float(new)


def update(
    state: PPOState,
    rollout: Rollout,
    *,
    learner: Learner,
    config: PPOConfig,
    mesh: Mesh | None,
    row_lengths: Sequence[int] = (),
    kl: float | None = None,
) -> tuple[TrainState, TrainState | None, dict[str, float]]:
    """num_epochs passes over a rollout in num_minibatches parts, anew shuffled.

    With stop_kl they end where the policy is beyond it; kl is where it began.

    Returns: policy and critic states, and the metrics' means over the updates.
    """
    policy, critic = state.policy, state.critic

    def one(part: Rollout) -> dict[str, Any]:
        nonlocal policy, critic
        batch = local_rows(part, mesh)
        policy, metrics = learner["policy"].step(policy, batch)
        if critic is None:
            return metrics
        critic, own = learner["critic"].step(critic, batch)
        return {f"critic/{k}" if k in metrics else k: x for k, x in own.items()} | (
            metrics
        )

    parts = minibatches(rollout, config, state.iteration, row_lengths)
    rows = take_updates(one, parts, kl=kl, stop_kl=config.stop_kl)
    return policy, critic, update_metrics(rows)


def update_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the updates of an iteration; the critic's own are `critic/...`."""
    if not rows:
        return {}
    found = columns(rows)
    ratios, rates = found["val/ratio"], found["learning_rate"]
    skipped = found["skipped"].sum() + found.get("critic/skipped", np.zeros(1)).sum()
    return {name: float(x.mean()) for name, x in found.items()} | {
        "skipped": float(skipped),
        "lr": float(rates[-1]),
        "learning_rate": float(rates[-1]),
        "val/ratio_var": float(ratios.var(ddof=1)) if len(ratios) > 1 else 0.0,
        # 1 up to rounding, or sampling and training do not share one model.
        "val/ratio_first": float(ratios[0]),
    }
