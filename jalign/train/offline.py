"""SFT, reward models, DPO: one sequence, `_run`, with the functions of a `Recipe`."""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jalign import data, evaluate, models, sharding
from jalign.models import Model
from jalign.pretrained import Opened, load_pretrained, open_pretrained
from jalign.settings import settings_or
from jalign.train import objectives, optim
from jalign.train.config import DPOConfig, RewardConfig, RunConfig, SFTConfig
from jalign.train.folder import whole_folder
from jalign.train.held_out import (
    before_and_after,
    measure,
    sample_prompts,
    sample_texts,
    write_report,
)
from jalign.train.inputs import (
    examples_digest,
    run_inputs,
    tokenizer_inputs,
)
from jalign.train.loop import SkipGuard, fit, row_namer
from jalign.train.metrics import MetricsWriter, training_flops_per_token
from jalign.train.reference import reference_examples
from jalign.train.rows import load_run_rows
from jalign.train.run import Clock, Run, identify, open_run, restore_state
from jalign.train.step import abstract_state, init_state, make_train_step
from jalign.types import TrainState

PyTree = Any
_log = logging.getLogger("jalign.train")


class Recipe(NamedTuple):
    """How an offline recipe differs from the others.

    Attributes:
      kind: its name.
      examples: (rows, tokenizer) -> (examples, counts).
      collate: (examples, length) -> batch.
      prepare: (model, params) -> (model, params), for example adding a head; None for
        a language model as it is.
      objective: model -> Objective.
      measure: (model, params, batches) -> held-out figures.
      reference: whether the examples need reference log-probabilities.
    """

    kind: str
    examples: Callable[[Any, Any], tuple[list, dict[str, int]]]
    collate: Callable[[Any, int], Any]
    prepare: Callable[[Model, PyTree], tuple[Model, PyTree]] | None
    objective: Callable[[Model], objectives.Objective]
    measure: Callable[[Model, PyTree, Any], dict[str, float]]
    reference: bool = False


def run_sft(config: SFTConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Supervised fine-tuning; returns the summary that the report shows.

    For a config, settings by the flags' names: run_sft(model=..., data=rows, out=...).
    Writes OUT/model (HF format), OUT/checkpoints, OUT/metrics.jsonl, OUT/report.html.
    Raises: ValueError about settings, data or OUT; stop.Preempted; loop.Diverged.
    """
    config = settings_or(SFTConfig, config, settings)
    options = config.sft

    def examples(rows, tokenizer):
        found, counts = data.sft_examples(
            rows,
            tokenizer,
            assistant_only=options.assistant_only,
            completion_only=options.completion_only,
            **_how(config),
        )
        packed = data.pack(found, config.max_length) if options.packing else found
        return packed, counts

    def objective(model):
        return objectives.make_sft_objective(model, terms=options.terms())

    return _run(
        config,
        Recipe(
            "sft",
            examples,
            data.collate_tokens,
            None,
            objective,
            evaluate.eval_loss,
        ),
    )


def run_reward(config: RewardConfig | None = None, **settings: Any) -> dict[str, Any]:
    """A reward model; as run_sft. OUT/model has num_labels = 1."""
    config = settings_or(RewardConfig, config, settings)

    def prepare(model, params):
        if model.config.num_labels:
            return model, params
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        return models.add_scalar_head(model, params, key=key)

    def examples(rows, tokenizer):
        found, counts = _preference_examples(config)(rows, tokenizer)
        if cut := counts["truncated"]:
            _log.warning("%d pairs are scored where --max-length cuts them", cut)
        return found, counts

    def objective(model):
        return objectives.make_reward_objective(
            model,
            terms=config.reward.terms(),
            center_coef=config.reward.center_coef,
        )

    return _run(
        config,
        Recipe(
            "reward",
            examples,
            data.collate_preferences,
            prepare,
            objective,
            evaluate.preference_accuracy,
        ),
    )


def run_dpo(config: DPOConfig | None = None, **settings: Any) -> dict[str, Any]:
    """DPO or a relative; as run_sft. The reference is the start model."""
    config = settings_or(DPOConfig, config, settings)
    options = config.dpo

    def objective(model):
        return objectives.make_dpo_objective(
            model, terms=options.terms(), beta=options.reward_beta
        )

    return _run(
        config,
        Recipe(
            "dpo",
            _preference_examples(config),
            data.collate_preferences,
            None,
            objective,
            functools.partial(evaluate.preference_accuracy, beta=options.reward_beta),
            reference=True,
        ),
    )


def _run(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    with open_run(config, recipe.kind) as run:
        clock = Clock()
        # Whatever is wrong with the rows is said before the model is loaded.
        train_rows, eval_rows = load_run_rows(config.data, config)
        head = None if recipe.prepare else "language"
        opened = open_pretrained(config.model, head=head, max_length=config.max_length)
        tokenizer = opened.tokenizer
        found = tokenizer_inputs(tokenizer)
        if recipe.prepare:
            data.end_template_at_turn(tokenizer)
        sets = {"train": recipe.examples(train_rows, tokenizer)[0]}
        if eval_rows is not None:
            sets["eval"] = recipe.examples(eval_rows, tokenizer)[0]
        clock.lap("read data")
        model, params = _load(config, recipe, run, opened)
        size = len(sets["train"]), config.batch_size
        steps = config.steps or data.num_steps(*size, config.epochs)
        found |= run_inputs(config, params, sets["train"], steps)
        held_out = examples_digest(sets.get("eval", []))
        run = identify(run, found, held_out, reschedule=config.reschedule)
        clock.lap("load model")
        how = {"batch_size": config.batch_size, "max_length": config.max_length}
        if recipe.reference:
            cache = run.out / "reference.npz"
            sets = reference_examples(model, params, sets, **how, cache=cache)
            clock.lap("reference log-probs")
        prompts = []
        if not model.config.num_labels:
            shown = eval_rows or train_rows
            prompts = sample_prompts(shown, tokenizer, config.columns)

        def look(params):
            given = recipe.measure, model, params, sets.get("eval")
            figures = measure(*given, collate=recipe.collate, **how)
            return figures, sample_texts(model, params, tokenizer, prompts)

        before = look(params)
        clock.lap("evaluate before")
        given = params, sets["train"], train_rows, steps
        state, num_tokens, skipped = _train(config, recipe, run, model, *given)
        clock.lap("train")
        after = look(state.params)
        clock.lap("evaluate after")
        with whole_folder(run.out / "model") as folder:
            models.save(folder, model, state.params, tokenizer)
        clock.lap("save model")
        summary = {"steps": int(state.step), "num_tokens": int(num_tokens)} | skipped
        summary |= before_and_after(before[0], after[0])
        texts = prompts, before[1], after[1]
        write_report(config, recipe.kind, summary, clock.seconds, *texts)
        return summary | {"model": str(run.out / "model")}


def _load(config: RunConfig, recipe: Recipe, run: Run, opened: Opened):
    how = {"dtype": config.compute.dtype, "remat": config.compute.remat}
    model, params, _ = load_pretrained(opened, mesh=run.mesh, **how)
    return recipe.prepare(model, params) if recipe.prepare else (model, params)


def _preference_examples(config: RunConfig):
    return functools.partial(data.preference_examples, **_how(config))


def _how(config: RunConfig) -> dict[str, Any]:
    return {n: getattr(config, n) for n in ("max_length", "bad_rows", "columns")}


def _train(
    config: RunConfig, recipe: Recipe, run: Run, model, params, examples, rows, steps
) -> tuple[TrainState, float, dict[str, int]]:
    """(last state, tokens seen, steps skipped); takes the parameters over."""
    tx, schedule = optim.make_optimizer(config.optim, steps)
    state, meta = _first_state(config, run, params, tx, steps)
    names = row_namer(rows, examples, config)
    guard = SkipGuard(meta.get("skipped", ()), names=names)
    start = int(state.step)
    step_fn = make_train_step(
        recipe.objective(model),
        tx,
        microbatches=config.compute.microbatches,
        state_shardings=run.mesh and sharding.state_shardings(run.mesh, state),
        schedule=schedule,
    )
    writer = MetricsWriter(
        run.out,
        total_steps=steps,
        start_step=start,
        num_tokens=meta.get("num_tokens", 0.0),
        flops_per_token=training_flops_per_token(state.params),
        title=recipe.kind,
    )
    try:
        state = fit(
            state,
            step_fn,
            _batches(config, recipe, run, examples, start, steps),
            steps=steps,
            writer=writer,
            checkpointer=run.checkpointer,
            checkpoint_every=config.checkpoint_every,
            meta=run.meta,
            mesh=run.mesh,
            stop=run.stop,
            guard=guard,
        )
    finally:
        writer.close()
    return state, writer.num_tokens, guard.summary()


def _first_state(config: RunConfig, run: Run, params, tx, steps: int):
    """The newest checkpoint's state and record, or a fresh one and {}."""
    abstract = abstract_state(params, tx, mesh=run.mesh)
    restored = restore_state(run, {"state": abstract})
    if restored is None:
        key = jax.random.key(config.seed)
        return init_state(params, tx, key, mesh=run.mesh), {}
    if restored.step > steps:
        raise ValueError(
            f"{run.out} has already taken {restored.step} steps, not just {steps}"
        )
    return restored.tree["state"], restored.meta


def _batches(config, recipe, run, examples, start, steps):
    index, count = sharding.process_slice(run.mesh)
    pieces = sharding.batch_parts(run.mesh) * config.compute.microbatches
    return data.make_loader(
        examples,
        batch_size=config.batch_size,
        seed=config.seed,
        collate=recipe.collate,
        max_length=config.max_length,
        pack_rows=pieces,
        shard_index=index,
        shard_count=count,
        start_step=start,
        steps=steps,
    )
