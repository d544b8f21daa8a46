"""Before and after: held-out figures and sample texts for the report."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jalign import data, evaluate, sharding
from jalign.data.examples import encode_prompt_rows
from jalign.models import Model

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
    index, count = sharding.process_slice(model.mesh)
    batches = data.make_eval_loader(
        examples,
        batch_size=batch_size,
        collate=collate,
        max_length=max_length,
        shard_index=index,
        shard_count=count,
    )
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


def before_and_after(before: dict, after: dict) -> dict[str, float]:
    """eval_* figures after training, and those that it changed, before it."""
    summary = {}
    for name, value in after.items():
        if before[name] != value:
            summary[f"eval_{name}_before"] = before[name]
        summary[f"eval_{name}"] = value
    return summary
