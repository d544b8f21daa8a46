"""`jalign ppo`, `jalign grpo`: from prompts and a reward to an aligned checkpoint."""

import functools
import itertools
from pathlib import Path
from typing import Any

from jalign import data, models
from jalign.paths import located
from jalign.pretrained import open_pretrained
from jalign.settings import settings_or
from jalign.sharding.context import length_multiple
from jalign.train.evaluations import NO_CALLBACKS, Callbacks
from jalign.train.grpo import GRPO
from jalign.train.inputs import (
    WEIGHTS,
    agree_before_loading,
    examples_digest,
    params_digest,
    rows_inputs,
    tokenizer_inputs,
)
from jalign.train.loop import row_namer
from jalign.train.online_config import GRPOConfig, OnlineConfig, PPOConfig
from jalign.train.online_models import OnlineModels, load_models, make_functions
from jalign.train.ppo import PPO
from jalign.train.recipe import measure_start, resumed, train_and_report
from jalign.train.rollout import ROLLOUT_KL, evaluate_prompts
from jalign.train.rows import examples_of, load_run_rows
from jalign.train.run import identify, open_run
from jalign.train.shapes import choose_shapes
from jalign.train.trained import save, save_whole
from jalign.train.updates import (
    Algorithm,
    OnlineState,
    iterate,
    kl_control,
    make_trainers,
    start_state,
)
from jalign.types import TrainState


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


def _run(
    config: OnlineConfig, algorithm: Algorithm, callbacks: Callbacks
) -> dict[str, Any]:
    with open_run(config, algorithm.name, callbacks) as run:
        # Rows are cheap to refuse: everything about them is known before a model.
        train_rows, eval_rows = load_run_rows(config.data, config)
        how: dict[str, Any] = {"head": "language", "max_length": config.max_length}
        opened = open_pretrained(config.model, config.base, **how)
        found = tokenizer_inputs(opened.tokenizer)
        prompts = make_prompts(train_rows, opened.tokenizer, config)
        held_out = []
        if eval_rows is not None:
            held_out = make_prompts(eval_rows, opened.tokenizer, config)
        size = len(prompts), config.batch_size
        steps = config.steps or data.num_steps(*size, config.epochs)
        found |= rows_inputs(config, prompts, steps)
        shown = examples_digest(held_out)
        agree_before_loading(opened, found, shown)
        loaded = load_models(config, run.mesh, opened)
        whole, start = loaded.params["policy"], loaded.parts["policy"].params
        found |= {WEIGHTS: params_digest(whole)} | dict(loaded.inputs)
        shown += loaded.gold_digest
        run = identify(run, found, shown, reschedule=config.reschedule)
        multiple = length_multiple(run.mesh)
        shapes = choose_shapes(prompts, held_out, config, multiple)
        given = loaded, config, shapes
        functions = make_functions(*given, group_size=config.group_size)
        measured = make_functions(*given, held_out=len(held_out))
        trainers = make_trainers(algorithm, loaded, config, steps)
        run.clock.lap("load")

        def look(params):
            return evaluate_prompts(measured, params, held_out, config)

        evaluations = measure_start(run, start, look, digest=shown)
        restored = resumed(run, loaded.parts, trainers, steps)
        if restored is None:
            state = start_state(loaded, trainers, config)
        else:
            kl_coef = restored.meta.get("kl_coef", 0.0)
            state = OnlineState(restored.tree, kl_coef, restored.step)
        del start, whole
        loaded.params.clear()  # the state has its own

        def step(state, _):
            state, metrics = iterate(
                state,
                prompts,
                algorithm=algorithm,
                functions=functions,
                trainers=trainers,
                config=config,
                mesh=run.mesh,
            )
            evaluations.rollout(state.iteration, metrics.get(ROLLOUT_KL, 0.0))
            return state, metrics

        def stored(state):
            numbers = {"kl_coef": state.kl_coef} if kl_control(config) else {}
            return state.models, numbers

        return train_and_report(
            run,
            evaluations,
            state=state,
            step_fn=step,
            batches=itertools.repeat(()),  # an iteration draws its own prompts
            steps=steps,
            restored=restored,
            names=row_namer([prompt.row for prompt in prompts], prompts, config),
            prompts=held_out,
            save=functools.partial(save_models, loaded, config),
            counts=lambda s, _: {"iterations": s.iteration} | stored(s)[1],
            stored=stored,
        )


def make_prompts(
    rows: data.Rows, tokenizer: Any, config: OnlineConfig
) -> list[data.PromptExample]:
    """The prompts that leave room for a completion.

    Raises: as data.prompt_examples.
    """
    return examples_of(
        data.prompt_examples,
        rows,
        tokenizer,
        max_prompt_length=config.max_length - config.options.sampling.max_new_tokens,
        bad_rows=config.bad_rows,
        columns=config.columns,
    )[0]


def save_models(
    loaded: OnlineModels, config: OnlineConfig, states: dict[str, TrainState]
) -> Path:
    """OUT/model or OUT/adapter, and OUT/critic where asked for; returns the first."""
    found = {
        name: (loaded.models[name], loaded.parts[name].whole(state.params))
        for name, state in states.items()
    }
    policy, params = loaded.models["policy"], states["policy"].params
    if policy.value_head:
        policy, params = models.split_heads(policy, params)[0]
        found["critic"] = models.split_heads(*found["policy"])[1]
    out = located(config.out)
    if isinstance(config, PPOConfig) and config.ppo.critic.save_critic:
        save_whole(out / "critic", *found["critic"], loaded.tokenizer)
    given = policy, loaded.parts["policy"], params, loaded.tokenizer, config
    return save(out, *given)
