"""SFT, reward models, DPO: the rows of run_recipe."""

import functools
import logging
from typing import Any

import jax

from jalign import data, evaluate, models
from jalign.settings import settings_or
from jalign.train import objectives
from jalign.train.config import DPOConfig, RewardConfig, RunConfig, SFTConfig
from jalign.train.evaluations import NO_CALLBACKS, Callbacks
from jalign.train.recipe import Recipe, run_recipe

PyTree = Any
_log = logging.getLogger("jalign.train")


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

    return run_recipe(
        config,
        Recipe(
            "sft",
            examples,
            data.collate_tokens,
            None,
            objective,
            evaluate.eval_loss,
        ),
        callbacks,
    )


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

    return run_recipe(
        config,
        Recipe(
            "reward",
            examples,
            data.collate_preferences,
            prepare,
            objective,
            evaluate.preference_accuracy,
        ),
        callbacks,
    )


def run_dpo(
    config: DPOConfig | None = None,
    *,
    callbacks: Callbacks = NO_CALLBACKS,
    **settings: Any,
) -> dict[str, Any]:
    """DPO or a relative; as run_sft. The reference is the start model."""
    config = settings_or(DPOConfig, config, settings)
    options = config.dpo

    def objective(model):
        return objectives.make_dpo_objective(
            model, terms=options.terms(), beta=options.reward_beta
        )

    return run_recipe(
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
        callbacks,
    )


def _preference_examples(config: RunConfig):
    return functools.partial(data.preference_examples, **_how(config))


def _how(config: RunConfig) -> dict[str, Any]:
    return {n: getattr(config, n) for n in ("max_length", "bad_rows", "columns")}
