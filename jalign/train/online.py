"""The online loop: `jalign ppo`, from prompts and a reward to an aligned checkpoint."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jalign import data, losses, models, report, sharding
from jalign.train.actors import Cast, load_cast, make_actors
from jalign.train.checkpoint import Checkpointer
from jalign.train.held_out import before_and_after
from jalign.train.loop import SkipGuard, StopSignal, raise_preempted
from jalign.train.metrics import MetricsWriter
from jalign.train.ppo import Learner, PPOState, iterate, make_learner, start_state
from jalign.train.ppo_config import PPOConfig
from jalign.train.rollout import Actors, sample_and_score
from jalign.train.run import Clock, Run, open_run, restore_state
from jalign.train.step import abstract_state
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
    config: PPOConfig,
) -> Evaluation:
    """Samples one completion for each prompt, with the same draw every time.

    Args:
      actors: of make_actors.
      params: the policy's.
      prompts: held-out ones; none gives no figures.
      config: for the seed and the batch size.
    """
    if not prompts:
        return Evaluation({}, [])
    key = jax.random.fold_in(jax.random.key(config.seed), _EVAL_STREAM)
    batch_size = config.batch_size
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

    Returns: what was measured before and after: eval_reward_before, eval_reward,
      eval_kl (to the reference, nats a completion), ...; iterations; kl_coef.
    Raises: ValueError for settings or data that do not fit; Preempted after a SIGTERM,
      when the state is saved; Diverged.
    """
    with open_run(config, "ppo") as run:
        clock = Clock()
        cast = load_cast(config, run.mesh)
        prompts = load_prompts(config.data, cast, config)
        held_out = load_prompts(config.eval_data, cast, config)
        total = config.steps or data.num_steps(
            len(prompts), config.batch_size, config.epochs
        )
        actors = make_actors(cast, config)
        learner = make_learner(cast, config, total)
        clock.lap("load")
        state, meta = restore(run, cast, learner)
        if state is None:
            before = evaluate_prompts(actors, cast.policy_params, held_out, config)
            state = start_state(cast, learner, config)
            meta = {"before": list(before), "num_tokens": 0.0}
            clock.lap("evaluate before")
        before = Evaluation(*meta["before"])
        state = fit(
            state,
            prompts,
            actors=actors,
            learner=learner,
            config=config,
            iterations=total,
            checkpointer=run.checkpointer,
            meta=meta | run.meta,
            mesh=run.mesh,
        )
        clock.lap("train")
        after = evaluate_prompts(actors, state.policy.params, held_out, config)
        clock.lap("evaluate after")
        save_models(state, cast, config)
        clock.lap("save model")
        summary = before_and_after(before.figures, after.figures)
        summary |= {"iterations": state.iteration, "kl_coef": state.kl_coef}
        if sharding.is_main_process():
            texts = zip(held_out, before.texts, after.texts, strict=False)
            report.write_report(
                run.out,
                title=f"PPO of {Path(config.model).name}",
                config=dataclasses.asdict(config),
                samples=[dict(prompt=p.text, before=b, after=a) for p, b, a in texts],
                summary=summary,
                timings=clock.seconds,
            )
        return summary | {"model": str(run.out / "model")}


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
        if checkpointer is not None:
            record = {"kl_coef": state.kl_coef, "num_tokens": writer.num_tokens}
            tree = {"policy": state.policy, "critic": state.critic}
            checkpointer.save(state.iteration, tree, meta | record)
        writer.restart_clock()

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
            # The metrics are on the host already: written now, with their own time.
            writer.log(number, metrics)
            guard.check(writer.flush())
            stopping = number < iterations and stop.requested(number)
            if stopping or number == iterations or (every and number % every == 0):
                save()
            if stopping:
                writer.close()
                raise_preempted(number, checkpointer)
    writer.close()
    return state


def load_prompts(
    source: str | None, cast: Cast, config: PPOConfig
) -> list[data.PromptExample]:
    """The prompts that leave room for a completion; none without a source.

    Raises: ValueError if there are none, or for a bad row unless they are skipped.
    """
    if source is None:
        return []
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


def restore(
    run: Run, cast: Cast, learner: Learner
) -> tuple[PPOState | None, dict[str, Any]]:
    """The newest good checkpoint's state and record, or (None, {})."""

    def abstract(model, tx):
        return abstract_state(model.param_shapes(), tx, mesh=run.mesh)

    found = restore_state(
        run,
        {
            "policy": abstract(cast.policy, learner.policy_tx),
            "critic": abstract(cast.critic, learner.critic_tx),
        },
    )
    if found is None:
        return None, {}
    states, kl_coef = found.tree, found.meta["kl_coef"]
    return PPOState(states["policy"], states["critic"], kl_coef, found.step), found.meta
