"""SFT, reward models, DPO: runs on given rows, and how they differ."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jalign import data, evaluate, models, sharding
from jalign.data.batching import in_multiples
from jalign.models import Model
from jalign.pretrained import load_pretrained, open_pretrained
from jalign.settings import settings_or
from jalign.sharding.context import length_multiple
from jalign.train import objectives
from jalign.train.config import DPOConfig, RewardConfig, RunConfig, SFTConfig
from jalign.train.evaluations import NO_CALLBACKS, Callbacks, Evaluation
from jalign.train.inputs import (
    WEIGHTS,
    agree_before_loading,
    examples_digest,
    params_digest,
    rows_inputs,
    tokenizer_inputs,
)
from jalign.train.loop import row_namer
from jalign.train.measured import (
    measure,
    reference_examples,
    sample_prompts,
    sample_texts,
)
from jalign.train.metrics import training_flops_per_token
from jalign.train.recipe import measure_start, resumed, train_and_report
from jalign.train.rows import examples_of, load_run_rows
from jalign.train.run import identify, open_run
from jalign.train.step import init_state
from jalign.train.trained import loading, make_trainer, part, save
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")


class Recipe(NamedTuple):
    """How an offline recipe differs from the others.

    Attributes:
      kind: its name.
      examples: (rows, tokenizer) -> examples.
      collate: (examples, length) -> batch.
      objective: model -> Objective.
      measure: (model, params, batches) -> held-out figures.
      prepare: (model, params) -> (model, params), for example adding a head; None for
        a language model as it is.
      reference: whether the examples need reference log-probabilities.
    """

    kind: str
    examples: Callable[[Any, Any], list]
    collate: Callable[[Any, int], Any]
    objective: Callable[[Model], objectives.Objective]
    measure: Callable[[Model, PyTree, Any], dict[str, float]]
    prepare: Callable[[Model, PyTree], tuple[Model, PyTree]] | None = None
    reference: bool = False


def run_recipe(
    config: RunConfig, recipe: Recipe, callbacks: Callbacks
) -> dict[str, Any]:
    with open_run(config, recipe.kind, callbacks) as run:
        # Whatever is wrong with the rows is said before the model is loaded.
        train_rows, eval_rows = load_run_rows(config.data, config)
        head = None if recipe.prepare else "language"
        how = {"head": head, "max_length": config.max_length}
        opened = open_pretrained(config.model, config.base, **how)
        tokenizer = opened.tokenizer
        found = tokenizer_inputs(tokenizer)
        if recipe.prepare:
            data.end_template_at_turn(tokenizer)
        sets = {"train": recipe.examples(train_rows, tokenizer)}
        if eval_rows is not None:
            sets["eval"] = recipe.examples(eval_rows, tokenizer)
        size = len(sets["train"]), config.batch_size
        steps = config.steps or data.num_steps(*size, config.epochs)
        found |= rows_inputs(config, sets["train"], steps)
        held_out = examples_digest(sets.get("eval", []))
        agree_before_loading(opened, found, held_out)
        run.clock.lap("read data")
        compute = config.compute
        how = {"mesh": run.mesh, "dtype": compute.dtype, "remat": compute.remat}
        model, params, _ = load_pretrained(opened, **how, **loading(config, opened))
        if recipe.prepare:
            model, params = recipe.prepare(model, params)
        found |= {WEIGHTS: params_digest(params)}
        run = identify(run, found, held_out, reschedule=config.reschedule)
        run.clock.lap("load model")
        how = {"batch_size": config.batch_size, "max_length": config.max_length}
        if recipe.reference:
            cache = run.out / "reference.npz"
            sets = reference_examples(model, params, sets, **how, cache=cache)
            run.clock.lap("reference log-probs")
        prompts = []
        if not model.config.num_labels:
            shown = eval_rows or train_rows
            prompts = sample_prompts(shown, tokenizer, config.columns)

        parted = part(config, model, params, opened)
        del params

        def look(params):
            given = recipe.measure, model, parted.whole(params), sets.get("eval")
            figures = measure(*given, collate=recipe.collate, **how)
            texts = sample_texts(model, parted.whole(params), tokenizer, prompts)
            return Evaluation(figures, texts)

        def save_best(tree):
            given = model, parted, tree["state"].params, tokenizer, config
            return save(run.out, *given)

        evaluations = measure_start(run, parted.params, look, digest=held_out)
        router = model, config.router_aux_coef
        trainer = make_trainer(
            objectives.with_router_loss(recipe.objective(model), *router),
            parted.params,
            config.optim,
            mesh=run.mesh,
            updates=steps,
            microbatches=compute.microbatches,
            dropout=config.lora.lora_dropout,
        )
        restored = resumed(run, {"state": parted}, {"state": trainer}, steps)
        if restored is None:
            key = jax.random.key(config.seed)
            state = init_state(parted.params, trainer.tx, key, mesh=run.mesh)
        else:
            state = restored.tree["state"]
        index, count = sharding.process_slice(run.mesh)
        batches = data.make_loader(
            sets["train"],
            **how,
            seed=config.seed,
            collate=in_multiples(recipe.collate, length_multiple(run.mesh)),
            pack_rows=sharding.batch_parts(run.mesh) * compute.microbatches,
            shard_index=index,
            shard_count=count,
            start_step=int(state.step),
            steps=steps,
        )
        return train_and_report(
            run,
            evaluations,
            state=state,
            step_fn=partial(trainer.step, frozen=parted.frozen),
            batches=batches,
            steps=steps,
            restored=restored,
            names=row_namer(train_rows, sets["train"], config),
            prompts=prompts,
            save=save_best,
            counts=lambda s, n: {"steps": int(s.step), "num_tokens": int(n)},
            flops_per_token=training_flops_per_token(
                state.params, parted.frozen, experts=model.config.share_of_experts
            ),
        )


def run_sft(
    config: SFTConfig | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> dict[str, Any]:
    """Supervised fine-tuning; returns the summary that the report shows.

    For a config, settings by the flags' names: run_sft(model=..., data=rows, out=...).
    Writes OUT/model (HF format), OUT/checkpoints, OUT/metrics.jsonl, OUT/report.html.
    With `callbacks` a notebook looks on.
    Raises: ValueError about settings, data or OUT; stop.Preempted; loop.Diverged.
    """
    config = settings_or(SFTConfig, config, settings)
    options = config.sft

    def examples(rows, tokenizer):
        found, _ = examples_of(
            data.sft_examples,
            rows,
            tokenizer,
            assistant_only=options.assistant_only,
            completion_only=options.completion_only,
            **_how(config),
        )
        return data.pack(found, config.max_length) if options.packing else found

    recipe = Recipe(
        "sft",
        examples,
        data.collate_tokens,
        partial(objectives.make_sft_objective, terms=options.terms()),
        evaluate.eval_loss,
    )
    return run_recipe(config, recipe, callbacks)


def run_reward(
    config: RewardConfig | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> dict[str, Any]:
    """A reward model; as run_sft. OUT/model has num_labels = 1."""
    config = settings_or(RewardConfig, config, settings)

    def prepare(model, params):
        if model.config.num_labels:
            return model, params
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        model, params = models.add_scalar_head(model, params, key=key)
        models.check_writable(model.config)
        return model, params

    def examples(rows, tokenizer):
        found, counts = _pairs(rows, tokenizer, config)
        if cut := counts["truncated"]:
            _log.warning("%d pairs are scored where --max-length cuts them", cut)
        return found

    options = config.reward
    how = {"terms": options.terms(), "center_coef": options.center_coef}
    recipe = Recipe(
        "reward",
        examples,
        data.collate_preferences,
        partial(objectives.make_reward_objective, **how),
        evaluate.preference_accuracy,
        prepare,
    )
    return run_recipe(config, recipe, callbacks)


def run_dpo(
    config: DPOConfig | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> dict[str, Any]:
    """DPO or a relative; as run_sft. The reference is the start model."""
    config = settings_or(DPOConfig, config, settings)
    terms, beta = config.dpo.terms(), config.dpo.reward_beta
    recipe = Recipe(
        "dpo",
        lambda rows, tokenizer: _pairs(rows, tokenizer, config)[0],
        data.collate_preferences,
        partial(objectives.make_dpo_objective, terms=terms, beta=beta),
        partial(evaluate.preference_accuracy, beta=beta),
        reference=True,
    )
    return run_recipe(config, recipe, callbacks)


def _pairs(rows: Any, tokenizer: Any, config: RunConfig):
    """The pairs of the rows, and the counts."""
    return examples_of(data.preference_examples, rows, tokenizer, **_how(config))


def _how(config: RunConfig) -> dict[str, Any]:
    return {n: getattr(config, n) for n in ("max_length", "bad_rows", "columns")}
