"""Prompts of any kind in, completions as text out: the one way from ids to a reader."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jalign import data
from jalign.generate import continuations, generate_lists
from jalign.models import Model
from jalign.rewards.samples import Samples, samples_of
from jalign.types import PyTree

_NO_LIMIT = 1 << 30
Tokens = Sequence[int] | np.ndarray
Prompt = str | dict[str, Any] | data.PromptExample | Tokens
"""A text, a data row, an encoded prompt, or token ids."""


def sample_texts(
    model: Model,
    params: PyTree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    key: jax.Array,
    max_new_tokens: int,
    **sampling: Any,
) -> list[str]:
    """The text with which the model continues each prompt.

    Args:
      model, params, tokenizer: a causal language model and its tokenizer.
      prompts: texts, data rows (`prompt`: a text or messages), PromptExamples or token
        ids. None is ever cut: one that is too long is an error.
      key: PRNG key; a prompt's text depends on it and the prompt's index.
      max_new_tokens: the most tokens for a prompt.
      **sampling: temperature, top_k, top_p, batch_size of `generate.generate_lists`;
        stop_tokens, by default `data.stop_tokens` of tokenizer and model.

    Returns: B texts, without special tokens.
    """
    how: dict[str, Any] = dict(key=key, max_new_tokens=max_new_tokens, **sampling)
    return sample_completions(model, params, tokenizer, prompts, **how).completions


def sample_completions(
    model: Model,
    params: PyTree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    stop_tokens: Sequence[int] | None = None,
    **how: Any,
) -> Samples:
    """As `sample_texts`: the texts with the ids that they were made from."""
    if stop_tokens is None:
        stop_tokens = data.stop_tokens(tokenizer, model.config.eos_token_ids)
    examples = encode_prompts(prompts, tokenizer)
    ids = [example.tokens.tolist() for example in examples]
    completions = generate_lists(model, params, ids, stop_tokens=stop_tokens, **how)
    texts = continuations(tokenizer, ids, completions, stop_tokens)
    return samples_of(examples, completions, texts, tokenizer, stop_tokens)


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any
) -> list[data.PromptExample]:
    """Prompts of any kind as PromptExamples: all of them, in their order."""
    rows: list[Any] = [{"prompt": p} if isinstance(p, str) else p for p in prompts]
    todo = [i for i, row in enumerate(rows) if isinstance(row, dict)]
    if todo:
        # No limit here: `generate` refuses a prompt that is too long, by its row.
        found, _ = data.prompt_examples(
            [rows[i] for i in todo], tokenizer, max_prompt_length=_NO_LIMIT
        )
        for i, example in zip(todo, found, strict=True):
            rows[i] = example

    def of_ids(ids):
        return data.PromptExample(np.asarray(ids, np.int32), tokenizer.decode(ids), {})

    return [r if isinstance(r, data.PromptExample) else of_ids(r) for r in rows]
