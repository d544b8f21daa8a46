"""The offline recipes: SFT, reward models, DPO. From a checkpoint and rows to OUT.

All three are one sequence, `_run`: load, make examples, measure, fit, measure, save,
report. A `Recipe` holds the four functions in which they differ.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jalign import data, evaluate, models, report, sharding
from jalign.models import Model
from jalign.train import objectives, optim
from jalign.train.checkpoint import Checkpointer
from jalign.train.config import DPOConfig, RewardConfig, RunConfig, SFTConfig
from jalign.train.loop import fit
from jalign.train.metrics import MetricsWriter, training_flops_per_token
from jalign.train.reference import reference_examples
from jalign.train.run import Run, open_run, restore_state
from jalign.train.step import init_state, make_train_step
from jalign.types import TrainState

PyTree = Any
_log = logging.getLogger("jalign.train")

# Held-out prompts continued before and after, for the report.
_NUM_SAMPLES, _SAMPLE_TOKENS = 4, 64


class Recipe(NamedTuple):
    """How an offline recipe differs from the others.

    Attributes:
      kind: its name.
      compute: its ComputeOptions.
      examples: (rows, tokenizer) -> (examples, counts).
      collate: (examples, length) -> batch.
      prepare: (model, params) -> (model, params), for example adding a head.
      objective: model -> Objective.
      measure: (model, params, batches) -> held-out figures.
      reference: whether the examples need reference log-probabilities.
    """

    kind: str
    compute: Any
    examples: Callable[[Any, Any], tuple[list, dict[str, int]]]
    collate: Callable[[Any, int], Any]
    prepare: Callable[[Model, PyTree], tuple[Model, PyTree]]
    objective: Callable[[Model], objectives.Objective]
    measure: Callable[[Model, PyTree, Any], dict[str, float]]
    reference: bool = False


def run_sft(config: SFTConfig) -> dict[str, Any]:
    """Supervised fine-tuning; returns the summary that the report shows.

    Writes OUT/model (HF format), OUT/checkpoints, OUT/metrics.jsonl, OUT/report.html.
    Raises: ValueError about settings, data or OUT; loop.Preempted; loop.Diverged.
    """
    options = config.sft

    def examples(rows, tokenizer):
        found, counts = data.sft_examples(
            rows,
            tokenizer,
            max_length=config.max_length,
            assistant_only=options.assistant_only,
            completion_only=options.completion_only,
            bad_rows=config.bad_rows,
        )
        return (data.pack(found, config.max_length) if options.packing else found), counts

    def objective(model):
        return objectives.make_sft_objective(
            model, label_smoothing=options.label_smoothing, z_loss=options.z_loss
        )

    return _run(
        config,
        Recipe(
            "sft",
            options.compute,
            examples,
            data.collate_tokens,
            _as_language_model,
            objective,
            evaluate.eval_loss,
        ),
    )


def run_reward(config: RewardConfig) -> dict[str, Any]:
    """A Bradley-Terry reward model; as run_sft. OUT/model has num_labels = 1."""

    def prepare(model, params):
        if model.config.num_labels:
            return model, params
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        return models.add_scalar_head(model, params, key=key)

    def objective(model):
        return objectives.make_reward_objective(
            model, center_coef=config.reward.center_coef
        )

    return _run(
        config,
        Recipe(
            "reward",
            config.reward.compute,
            _preference_examples(config),
            data.collate_preferences,
            prepare,
            objective,
            evaluate.preference_accuracy,
        ),
    )


def run_dpo(config: DPOConfig) -> dict[str, Any]:
    """Direct preference optimization; as run_sft. The reference is the start model."""
    options = config.dpo

    def objective(model):
        return objectives.make_dpo_objective(
            model, beta=options.beta, label_smoothing=options.label_smoothing
        )

    def measure(model, params, batches):
        return evaluate.preference_accuracy(model, params, batches, beta=options.beta)

    return _run(
        config,
        Recipe(
            "dpo",
            options.compute,
            _preference_examples(config),
            data.collate_preferences,
            _as_language_model,
            objective,
            measure,
            reference=True,
        ),
    )


def _run(config: RunConfig, recipe: Recipe) -> dict[str, Any]:
    timings: dict[str, float] = {}
    clock = _Clock(timings)
    with open_run(config, recipe.kind) as run:
        model, params, tokenizer = _load(config, recipe, run)
        data.check_vocab(tokenizer, model.config.vocab_size)
        clock.lap("load model")
        train = _examples(config, recipe, config.data, tokenizer)
        held_out = None
        if config.eval_data:
            held_out = _examples(config, recipe, config.eval_data, tokenizer)
        clock.lap("read data")
        if recipe.reference:
            sets = {"train": train} | ({"eval": held_out} if held_out else {})
            sets = reference_examples(model, params, sets, config, run)
            train, held_out = sets["train"], sets.get("eval")
            clock.lap("reference log-probs")
        steps = config.steps or data.num_steps(
            len(train), config.batch_size, config.epochs
        )
        prompts = _sample_prompts(config, model)
        before = _measure(config, recipe, model, params, held_out)
        texts = _sample(config, model, params, tokenizer, prompts)
        clock.lap("evaluate before")
        state, tokens = _train(config, recipe, run, model, params, train, steps)
        clock.lap("train")
        after = _measure(config, recipe, model, state.params, held_out)
        new_texts = _sample(config, model, state.params, tokenizer, prompts)
        clock.lap("evaluate after")
        models.save(run.out / "model", model, state.params, tokenizer)
        clock.lap("save model")
        summary: dict[str, Any] = {"steps": int(state.step), "num_tokens": int(tokens)}
        summary |= {f"eval_{name} before": value for name, value in before.items()}
        summary |= {f"eval_{name} after": value for name, value in after.items()}
        if sharding.is_main_process():
            samples = [
                {"prompt": p, "before": b, "after": a}
                for p, b, a in zip(prompts, texts, new_texts, strict=True)
            ]
            report.write_report(
                run.out,
                title=f"{recipe.kind.upper()} of {Path(config.model).name}",
                config=dataclasses.asdict(config),
                samples=samples,
                summary=summary,
                timings=timings,
            )
        return summary | {"model": str(run.out / "model")}


def _load(config: RunConfig, recipe: Recipe, run: Run):
    compute = recipe.compute
    model, params = models.load(
        config.model, mesh=run.mesh, dtype=compute.dtype, remat=compute.remat
    )
    model, params = recipe.prepare(model, params)
    return model, params, data.load_tokenizer(config.model)


def _as_language_model(model: Model, params: PyTree) -> tuple[Model, PyTree]:
    if model.config.num_labels:
        raise ValueError("this is a reward model; give a causal language model")
    return model, params


def _examples(config: RunConfig, recipe: Recipe, source: str, tokenizer) -> list:
    rows = data.load_rows(source)
    examples, _ = recipe.examples(rows, tokenizer)
    return examples


def _preference_examples(config: RunConfig):
    def examples(rows, tokenizer):
        return data.preference_examples(
            rows, tokenizer, max_length=config.max_length, bad_rows=config.bad_rows
        )

    return examples


def _measure(config, recipe, model, params, held_out) -> dict[str, float]:
    if held_out is None:
        return {}
    index, count = sharding.process_slice(model.mesh)
    batches = data.make_eval_loader(
        held_out,
        batch_size=config.batch_size,
        collate=recipe.collate,
        max_length=config.max_length,
        shard_index=index,
        shard_count=count,
    )
    return recipe.measure(model, params, batches)


def _train(
    config: RunConfig, recipe: Recipe, run: Run, model, params, examples, steps: int
) -> tuple[TrainState, float]:
    """(state after the last step, tokens seen)."""
    tx, schedule = optim.make_optimizer(config.optim, steps)
    state = init_state(params, tx, jax.random.key(config.seed), mesh=run.mesh)
    restored = restore_state(run, {"state": state})
    tokens = 0.0
    if restored is not None:
        state, tokens = restored.tree["state"], restored.meta["num_tokens"]
        if restored.step > steps:
            raise ValueError(
                f"{run.out} has already taken {restored.step} steps, more than "
                f"steps {steps}"
            )
    start = int(state.step)
    pinned = None if run.mesh is None else sharding.state_shardings(run.mesh, state)
    step_fn = make_train_step(
        recipe.objective(model),
        tx,
        microbatches=recipe.compute.microbatches,
        state_shardings=pinned,
        schedule=schedule,
    )
    writer = MetricsWriter(
        run.out,
        total_steps=steps,
        start_step=start,
        num_tokens=tokens,
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
        )
    finally:
        writer.close()
    return state, writer.num_tokens


def _batches(config, recipe, run, examples, start, steps):
    index, count = sharding.process_slice(run.mesh)
    return data.make_loader(
        examples,
        batch_size=config.batch_size,
        seed=config.seed,
        collate=recipe.collate,
        max_length=config.max_length,
        shard_index=index,
        shard_count=count,
        start_step=start,
        steps=steps,
    )
