"""One run on given rows, top to bottom: load, measure, train, measure, save, report."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jalign import data, models, sharding
from jalign.models import Model
from jalign.pretrained import Opened, load_pretrained, open_pretrained
from jalign.train import objectives, optim
from jalign.train.config import RunConfig
from jalign.train.evaluations import Callbacks, Evaluation, Evaluations
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
from jalign.train.run import (
    Clock,
    Run,
    identify,
    kept_tree,
    open_run,
    restore_state,
)
from jalign.train.step import abstract_state, init_state, make_train_step

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


def run_recipe(
    config: RunConfig, recipe: Recipe, callbacks: Callbacks
) -> dict[str, Any]:
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
            return Evaluation(figures, sample_texts(model, params, tokenizer, prompts))

        evaluations = Evaluations(
            look,
            config,
            digest=held_out,
            record=run.previous,
            on_eval=callbacks.on_eval,
        )
        evaluations.measure(0, params)
        clock.lap("evaluate before")
        given = params, sets["train"], train_rows, steps
        trained = _train(config, recipe, run, model, *given, evaluations, callbacks)
        clock.lap("train")
        with whole_folder(run.out / "model") as folder:
            models.save(folder, model, trained.params, tokenizer)
        clock.lap("save model")
        summary = trained.summary | before_and_after(evaluations, trained.kept)
        given = prompts, evaluations, trained.kept
        write_report(config, recipe.kind, summary, clock.seconds, *given)
        return summary | {"model": str(run.out / "model")}


def _load(config: RunConfig, recipe: Recipe, run: Run, opened: Opened):
    how = {"dtype": config.compute.dtype, "remat": config.compute.remat}
    model, params, _ = load_pretrained(opened, mesh=run.mesh, **how)
    return recipe.prepare(model, params) if recipe.prepare else (model, params)


class _Trained(NamedTuple):
    """What came of training: the parameters to export, of which step, and numbers."""

    params: PyTree
    kept: int
    summary: dict[str, Any]


def _train(
    config: RunConfig,
    recipe: Recipe,
    run: Run,
    model,
    params,
    examples,
    rows,
    steps,
    evaluations: Evaluations,
    callbacks: Callbacks,
) -> _Trained:
    """Takes the parameters over."""
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
        on_step=callbacks.on_step,
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
            evaluations=evaluations,
        )
    finally:
        writer.close()
    last = int(state.step)
    summary = {"steps": last, "num_tokens": int(writer.num_tokens)} | guard.summary()
    best = kept_tree(run, evaluations, {"state": state}, last)
    kept = last if best is None else best.step
    params = state.params if best is None else best.tree["state"].params
    return _Trained(params, kept, summary | evaluations.summary(last))


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
