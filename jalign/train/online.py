"""The online loop: `jalign ppo`, from prompts and a reward to an aligned checkpoint."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jalign import data, losses, models, report, sharding
from jalign.train.actors import Cast, load_cast, make_actors
from jalign.train.checkpoint import Checkpointer
from jalign.train.loop import SkipGuard, StopSignal, raise_preempted
from jalign.train.metrics import MetricsWriter
from jalign.train.ppo import Learner, PPOState, iterate, make_learner, start_state
from jalign.train.ppo_config import PPOConfig
from jalign.train.ppo_resume import fingerprint, restore
from jalign.train.rollout import Actors, sample_and_score
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")
_EVAL_STREAM = 2**31 - 1  # no iteration gets as far, so no rollout uses its key
_SAMPLES = 8  # completions kept for the report


class Evaluation(NamedTuple):
    """What a policy does on held-out prompts.

    Attributes:
      figures: name -> mean over the prompts: reward, kl (to the reference, nats a
        completion), completion_length (tokens), stopped (share).
      texts: its first completions.
    """

    figures: dict[str, float]
    texts: list[str]


def evaluate_prompts(
    actors: Actors,
    params: PyTree,
    prompts: Sequence[data.PromptExample],
    *,
    key: jax.Array,
    batch_size: int,
) -> Evaluation:
    """Samples one completion for each prompt; the same key gives the same draw.

    Args:
      actors: of make_actors.
      params: the policy's.
      prompts: at least one.
      key: typed PRNG key.
      batch_size: prompts at once.
    """
    parts = []
    for number, start in enumerate(range(0, len(prompts), batch_size)):
        part = prompts[start : start + batch_size]
        part_key = jax.random.fold_in(key, number)
        parts.append(sample_and_score(actors, params, part, part_key))

    def mean(of) -> float:
        return float(np.concatenate([of(part) for part in parts]).mean())

    figures = {
        "reward": mean(lambda x: x.rewards),
        "kl": mean(lambda x: np.asarray(losses.kl_k1(x.logps, x.ref_logps)).sum(1)),
        "completion_length": mean(lambda x: x.batch.completion_mask.sum(1)),
        "stopped": mean(lambda x: x.stopped),
    }
    return Evaluation(figures, parts[0].texts[:_SAMPLES])


def run_ppo(config: PPOConfig) -> dict[str, Any]:
    """Trains; writes OUT/model, OUT/checkpoints, OUT/metrics.jsonl and OUT/report.html.

    The same command again continues from the last checkpoint, exactly.

    Returns: what was measured before and after, and how long it took.
    Raises: ValueError for settings or data that do not fit; Preempted after a SIGTERM,
      when the state is saved; Diverged.
    """
    began = time.perf_counter()
    sharding.agree("the configuration", config)
    mesh_sizes: dict[str, Any] = dict(sharding.parse_mesh(config.mesh))
    mesh = sharding.make_mesh(**mesh_sizes)
    cast = load_cast(config, mesh)
    prompts = load_prompts(config.data, cast, config)
    held_out = load_prompts(config.eval_data, cast, config) if config.eval_data else []
    iterations = config.steps or data.num_steps(
        len(prompts), config.batch_size, config.epochs
    )
    actors = make_actors(cast, config)
    learner = make_learner(cast, config, iterations)
    checkpointer = Checkpointer(Path(config.out) / "checkpoints")
    key = jax.random.fold_in(jax.random.key(config.seed), _EVAL_STREAM)

    def evaluate(params) -> Evaluation:
        if not held_out:
            return Evaluation({}, [])
        size = config.batch_size
        return evaluate_prompts(actors, params, held_out, key=key, batch_size=size)

    state, meta = restore(checkpointer, cast, learner, config)
    if state is None:
        before = evaluate(cast.policy_params)
        state = start_state(cast, learner, config)
        meta = {"before": list(before), "num_tokens": 0.0}
    before = Evaluation(*meta["before"])
    loaded = time.perf_counter()
    state = fit(
        state,
        prompts,
        actors=actors,
        learner=learner,
        config=config,
        iterations=iterations,
        checkpointer=checkpointer,
        meta=meta | {"fingerprint": fingerprint(config)},
        mesh=mesh,
    )
    trained = time.perf_counter()
    after = evaluate(state.policy.params)
    save_models(state, cast, config)
    checkpointer.close()
    timings = {
        "load and evaluate": loaded - began,
        "train": trained - loaded,
        "evaluate and save": time.perf_counter() - trained,
    }
    summary = summarize(before, after, state)
    if sharding.is_main_process():
        write_run_report(config, summary, before, after, held_out, timings)
    return summary | {"out": config.out}


def fit(
    state: PPOState,
    prompts: Sequence[data.PromptExample],
    *,
    actors: Actors,
    learner: Learner,
    config: PPOConfig,
    iterations: int,
    checkpointer: Checkpointer | None = None,
    meta: Mapping[str, Any] | None = None,
    mesh: Any = None,
) -> PPOState:
    """Iterates until `iterations` rollouts have been learned from.

    Policy, critic, KL coefficient and position are saved in one step, between
    iterations only: a kill at any time goes back to a boundary, with all four.

    Args:
      state: from where; donated.
      prompts: all prompts.
      actors, learner, config, mesh: as in iterate.
      iterations: of the whole run.
      checkpointer: None saves nothing.
      meta: JSON values stored with each checkpoint.

    Raises: Preempted, once the state is saved; Diverged.
    """
    meta, guard = dict(meta or {}), SkipGuard()
    writer = MetricsWriter(
        config.out,
        total_steps=iterations,
        start_step=state.iteration,
        num_tokens=meta.get("num_tokens", 0.0),
        title="ppo",
    )

    def save() -> None:
        guard.check(writer.flush())
        if checkpointer is not None:
            record = {"kl_coef": state.kl_coef, "num_tokens": writer.num_tokens}
            tree = {"policy": state.policy, "critic": state.critic}
            checkpointer.save(state.iteration, tree, meta | record)

    every = config.checkpoint_every
    with StopSignal() as stop:
        while state.iteration < iterations:
            state, metrics = iterate(
                state,
                prompts,
                actors=actors,
                learner=learner,
                config=config,
                mesh=mesh,
            )
            number = state.iteration
            guard.check(writer.log(number, metrics))
            stopping = number < iterations and stop.requested(number)
            if stopping or number == iterations or (every and number % every == 0):
                save()
            if stopping:
                writer.close()
                raise_preempted(number, checkpointer)
    writer.close()
    return state


def load_prompts(
    source: str, cast: Cast, config: PPOConfig
) -> list[data.PromptExample]:
    """The prompts that leave room for a completion.

    Raises: ValueError if there are none, or for a bad row unless they are skipped.
    """
    room = config.max_length - config.ppo.sampling.max_new_tokens
    prompts, counts = data.prompt_examples(
        data.load_rows(source, bad_rows=config.ppo.bad_rows),
        cast.tokenizer,
        max_prompt_length=room,
        bad_rows=config.ppo.bad_rows,
    )
    _log.info("%s: %d prompts %s", source, len(prompts), counts or "")
    return prompts


def save_models(state: PPOState, cast: Cast, config: PPOConfig) -> None:
    """OUT/model, and OUT/critic where asked for, in HF format."""
    out = Path(config.out)
    models.save(out / "model", cast.policy, state.policy.params, cast.tokenizer)
    if config.ppo.save_critic:
        models.save(out / "critic", cast.critic, state.critic.params, cast.tokenizer)


def summarize(before: Evaluation, after: Evaluation, state: PPOState) -> dict[str, Any]:
    """Flat figures: eval_reward_before, eval_reward_after, ..., iterations, kl_coef."""
    pairs = {
        f"eval_{name}_{when}": value
        for name in after.figures
        for when, value in (
            ("before", before.figures.get(name)),
            ("after", after.figures[name]),
        )
        if value is not None
    }
    return pairs | {"iterations": state.iteration, "kl_coef": state.kl_coef}


def write_run_report(
    config: PPOConfig,
    summary: Mapping[str, Any],
    before: Evaluation,
    after: Evaluation,
    held_out: Sequence[data.PromptExample],
    timings: Mapping[str, float],
) -> None:
    """OUT/report.html, with the first held-out prompts' completions side by side."""
    samples = [
        {"prompt": prompt.text, "before": old, "after": new}
        for prompt, old, new in zip(held_out, before.texts, after.texts, strict=False)
    ]
    report.write_report(
        config.out,
        title=f"PPO on {Path(config.data).stem}",
        config=dataclasses.asdict(config),
        samples=samples,
        summary=summary,
        timings=timings,
    )
