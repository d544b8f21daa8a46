"""Before and after: held-out figures and sample texts for the report."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jalign import data, evaluate, report, sharding
from jalign.data.examples import encode_prompt_rows
from jalign.models import Model
from jalign.settings import as_text
from jalign.train.batches import measured_batches
from jalign.train.config import RunConfig
from jalign.train.evaluations import Evaluations

PyTree = Any
_log = logging.getLogger("jalign.train")
Measure = Callable[[Model, PyTree, Any], dict[str, float]]

NUM_SAMPLES = 4
SAMPLE_TOKENS = 64
# Prompts for samples are short enough to be read, and quick to continue.
_PROMPT_TOKENS = 256


def measure(
    fn: Measure,
    model: Model,
    params: PyTree,
    examples: Sequence[Any] | None,
    *,
    batch_size: int,
    collate: Callable[[Any, int], Any],
    max_length: int,
) -> dict[str, float]:
    """fn's figures over all examples, each once; {} if there are none.

    Args:
      fn: (model, params, batches of this process's rows) -> figures.
      batch_size: rows of a batch, over all devices.
      collate, max_length: as in data.make_eval_loader.
    """
    if not examples:
        return {}
    how = {"collate": collate, "batch_size": batch_size, "max_length": max_length}
    _, batches = measured_batches(model.mesh, examples, **how)
    return fn(model, params, batches)


def sample_prompts(
    rows: Sequence[dict], tokenizer: Any, columns: str | None = None
) -> list[data.PromptExample]:
    """The first few prompts of the rows; none where they have none."""
    first = list(rows[: 8 * NUM_SAMPLES])
    found, bad = encode_prompt_rows(first, tokenizer, columns, quiet=True)
    short = [prompt for prompt in found if len(prompt.tokens) <= _PROMPT_TOKENS]
    if not short:
        why = bad[0].reason if bad else f"all are longer than {_PROMPT_TOKENS} tokens"
        _log.info("no sample texts in the report, of the prompts: %s", why)
    return short[:NUM_SAMPLES]


def sample_texts(
    model: Model, params: PyTree, tokenizer: Any, prompts: Sequence[data.PromptExample]
) -> list[str]:
    """How the model continues the prompts, greedily; [] for a reward model."""
    if model.config.num_labels or not prompts:
        return []
    return evaluate.sample_texts(
        model,
        params,
        tokenizer,
        list(prompts),
        key=jax.random.key(0),
        max_new_tokens=SAMPLE_TOKENS,
        temperature=0.0,
    )


def before_and_after(evaluations: Evaluations, step: int) -> dict[str, float]:
    """eval_* figures of a step, and those that training has changed, before it."""
    before, after = evaluations.at(0).figures, evaluations.at(step).figures
    summary = {}
    for name, value in after.items():
        if before[name] != value:
            summary[f"eval_{name}_before"] = before[name]
        summary[f"eval_{name}"] = value
    return summary


def write_report(
    config: RunConfig,
    kind: str,
    summary: Mapping[str, Any],
    seconds: Mapping[str, float],
    prompts: Sequence[data.PromptExample],
    evaluations: Evaluations,
    step: int,
) -> None:
    """OUT/report.html of a run, by process 0; what is wrong is said on the screen, too.

    Args:
      config: the run's.
      kind: of the recipe.
      summary, seconds: what came of it, and where the time went.
      prompts: of the sample texts; the first ones of each belong together.
      evaluations: of the run.
      step: whose parameters OUT/model has.
    """
    before, after = evaluations.at(0), evaluations.at(step)
    warnings = evaluations.warnings(step)
    for warning in warnings:
        _log.warning("%s", warning)
    if sharding.is_main_process():
        texts = zip(prompts, before.texts, after.texts, strict=False)
        report.write_report(
            config.out,
            title=f"{kind.upper()} of {Path(config.model).name}",
            config=as_text(config),
            samples=[dict(prompt=p.text, before=b, after=a) for p, b, a in texts],
            summary=summary,
            timings=seconds,
            evaluations=evaluations.metrics_rows(),
            kept_step=step if config.keep_best else None,
            warnings=warnings,
        )
