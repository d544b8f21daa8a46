"""The online loop: `jalign ppo` and `jalign grpo`, from prompts and a reward to an
aligned checkpoint."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jalign import data, models
from jalign.pretrained import open_pretrained
from jalign.settings import settings_or
from jalign.train import grpo, ppo
from jalign.train.actors import Cast, load_cast, make_actors, with_gold
from jalign.train.evaluations import NO_CALLBACKS, Callbacks, Evaluations
from jalign.train.folder import whole_folder
from jalign.train.held_out import before_and_after, write_report
from jalign.train.inputs import (
    examples_digest,
    run_inputs,
    tokenizer_inputs,
)
from jalign.train.loop import SkipGuard, row_namer
from jalign.train.online_config import GRPOConfig, OnlineConfig, PPOConfig
from jalign.train.online_eval import evaluate_prompts
from jalign.train.online_loop import State, divide, fit
from jalign.train.rows import load_run_rows
from jalign.train.run import (
    Clock,
    Run,
    identify,
    kept_tree,
    open_run,
    restore_state,
)
from jalign.train.shapes import choose_shapes
from jalign.train.step import abstract_state
from jalign.train.updates import Learner


class Method(NamedTuple):
    """An algorithm, as the loop asks for it.

    Attributes:
      name: of the command.
      load_cast: (config, mesh, Opened policy) -> Cast.
      make_learner: (cast, config, iterations) -> Learner.
      state: the class of its states.
      start_state: (cast, learner, config) -> state before the first rollout.
      iterate: (state, prompts, actors=, learner=, config=, mesh=) -> (state, metrics).
    """

    name: str
    load_cast: Callable[..., Cast]
    make_learner: Callable[..., Learner]
    state: type[State]
    start_state: Callable[..., State]
    iterate: Callable[..., tuple[State, dict[str, float]]]


PPO = Method(
    "ppo",
    ppo.choose_cast,
    ppo.make_learner,
    ppo.PPOState,
    ppo.start_state,
    ppo.iterate,
)
GRPO = Method(
    "grpo",
    functools.partial(load_cast, with_critic=False),
    grpo.make_learner,
    grpo.GRPOState,
    grpo.start_state,
    grpo.iterate,
)


def run_ppo(
    config: PPOConfig | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> dict[str, Any]:
    """Trains; writes OUT/model, OUT/checkpoints, OUT/metrics.jsonl and OUT/report.html.

    The same command again continues from the last checkpoint, exactly.

    Args:
      config: a PPOConfig; or None, and its fields as settings by the flat names of the
        flags: run_ppo(model=..., data=rows, reward=function, out=..., kl_coef=0.05).

    Returns: what was measured before and after: eval_reward_before, eval_reward,
      eval_kl (to the reference, nats a completion), ...; iterations; kl_coef.
    Raises: ValueError for settings or data that do not fit; Preempted after a SIGTERM,
      when the state is saved; Diverged.
    """
    return _run(settings_or(PPOConfig, config, settings), PPO, callbacks)


def run_grpo(
    config: GRPOConfig | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> dict[str, Any]:
    """As run_ppo, without a critic: the completions of a prompt judge each other.

    Returns: as run_ppo; eval_kl where beta > 0, no kl_coef.
    Raises: as run_ppo.
    """
    return _run(settings_or(GRPOConfig, config, settings), GRPO, callbacks)


def _run(config: OnlineConfig, method: Method, callbacks: Callbacks) -> dict[str, Any]:
    with open_run(config, method.name) as run:
        clock = Clock()
        # Rows are cheap to refuse: everything about them is known before a model.
        train_rows, eval_rows = load_run_rows(config.data, config)
        how: dict[str, Any] = {"head": "language", "max_length": config.max_length}
        opened = open_pretrained(config.model, **how)
        inputs = tokenizer_inputs(opened.tokenizer)
        prompts = make_prompts(train_rows, opened.tokenizer, config)
        held_out = []
        if eval_rows is not None:
            held_out = make_prompts(eval_rows, opened.tokenizer, config)
        total = config.steps or data.num_steps(
            len(prompts), config.batch_size, config.epochs
        )
        cast = method.load_cast(config, run.mesh, opened)
        inputs |= run_inputs(config, cast.policy_params, prompts, total)
        inputs |= cast.inputs
        shown = examples_digest(held_out) + cast.gold_digest
        run = identify(run, inputs, shown, reschedule=config.reschedule)
        shapes = choose_shapes(prompts, held_out, config)
        actors = make_actors(cast, config, shapes, group_size=config.group_size)
        judges = make_actors(cast, config, shapes, held_out=len(held_out))
        judges = with_gold(judges, cast.gold)
        evaluations = Evaluations(
            lambda params: evaluate_prompts(judges, params, held_out, config),
            config,
            digest=shown,
            record=run.previous,
            on_eval=callbacks.on_eval,
        )
        learner = method.make_learner(cast, config, total)
        clock.lap("load")
        state, meta = restore(run, cast, learner, method)
        evaluations.measure(0, cast.policy_params)
        clock.lap("evaluate before")
        if state is None:
            state = method.start_state(cast, learner, config)
        if not config.has_reference:
            cast = cast._replace(policy_params=None)  # the state has its own
        names = row_namer([prompt.row for prompt in prompts], prompts, config)
        guard = SkipGuard(meta.get("skipped", ()), names=names)
        state = fit(
            state,
            functools.partial(
                method.iterate,
                prompts=prompts,
                actors=actors,
                learner=learner,
                config=config,
                mesh=run.mesh,
            ),
            config=config,
            iterations=total,
            checkpointer=run.checkpointer,
            meta=meta | run.meta,
            title=method.name,
            stop=run.stop,
            guard=guard,
            evaluations=evaluations,
            on_step=callbacks.on_step,
        )
        clock.lap("train")
        last, (tree, numbers) = state.iteration, divide(state)
        best = kept_tree(run, evaluations, tree, last)
        kept = last
        if best is not None:
            state, kept = state._replace(**best.tree), best.step
        save_models(state, cast, config)
        clock.lap("save model")
        summary = before_and_after(evaluations, kept)
        summary |= {"iterations": last} | numbers | guard.summary()
        summary |= evaluations.summary(last)
        given = held_out, evaluations, kept
        write_report(config, method.name, summary, clock.seconds, *given)
        return summary | {"model": str(run.out / "model")}


def make_prompts(
    rows: data.Rows, tokenizer: Any, config: OnlineConfig
) -> list[data.PromptExample]:
    """The prompts that leave room for a completion.

    Raises: as data.prompt_examples.
    """
    return data.prompt_examples(
        rows,
        tokenizer,
        max_prompt_length=config.max_length - config.options.sampling.max_new_tokens,
        bad_rows=config.bad_rows,
        columns=config.columns,
    )[0]


def save_models(state: State, cast: Cast, config: OnlineConfig) -> None:
    """OUT/model, and OUT/critic where asked for, in HF format."""
    out = Path(config.out)
    policy, critic = (cast.policy, state.policy.params), None
    if cast.policy.value_head:
        policy, critic = models.split_heads(*policy)
    elif cast.critic:
        critic = cast.critic, state.critic.params
    if critic and isinstance(config, PPOConfig) and config.ppo.critic.save_critic:
        with whole_folder(out / "critic") as folder:
            models.save(folder, *critic, cast.tokenizer)
    with whole_folder(out / "model") as folder:
        models.save(folder, *policy, cast.tokenizer)


def restore(
    run: Run, cast: Cast, learner: Learner, method: Method
) -> tuple[State | None, dict[str, Any]]:
    """The newest good checkpoint's state and record, or (None, {})."""
    found = restore_state(
        run,
        {
            name: abstract_state(
                getattr(cast, name).param_shapes(), trainer.tx, mesh=run.mesh
            )
            for name, trainer in learner.items()
        },
    )
    if found is None:
        return None, {}
    fields = method.state.__annotations__
    numbers = {k: found.meta[k] for k, kind in fields.items() if kind is float}
    return method.state(**found.tree, **numbers, iteration=found.step), found.meta
