"""Sampled completions, as a reward function is given them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.data import PromptExample
from jalign.data.formats import Prompt

Tokens = Sequence[int] | np.ndarray
RewardFn = Callable[..., np.ndarray]
"""(prompts, completions, rows), each a list of B -> float32 [B]. One that names the
keyword `samples`, as those of `model_reward` and `checked`, is also given the whole
`Samples`, token ids among them. NaN is a row that is not judged (`checked`)."""


class Samples(NamedTuple):
    """Completions of B prompts: their texts, and what the texts were made from.

    Attributes:
      prompts: texts, as the policy saw them, templated if they were conversations.
      completions: texts, without the token that ended them.
      rows: the whole data rows.
      sources: the prompts themselves, texts or conversations; None where unknown.
      prompt_ids, completion_ids: token ids of the policy's tokenizer.
      tokenizer: the policy's.
      stop_tokens: ids, one of which ends a completion that came to an end.
    """

    prompts: list[str]
    completions: list[str]
    rows: list[dict[str, Any]]
    sources: Sequence[Prompt | None]
    prompt_ids: Sequence[Tokens]
    completion_ids: Sequence[Tokens]
    tokenizer: Any
    stop_tokens: Sequence[int]


def samples_of(
    examples: Sequence[PromptExample],
    completion_ids: Sequence[Tokens],
    completions: list[str],
    tokenizer: Any,
    stop_tokens: Sequence[int],
) -> Samples:
    """The Samples of encoded prompts, their completions' ids and texts, each B."""
    return Samples(
        [example.text for example in examples],
        completions,
        [example.row for example in examples],
        [example.source for example in examples],
        [np.asarray(example.tokens).tolist() for example in examples],
        completion_ids,
        tokenizer,
        stop_tokens,
    )


def reward_of(function: RewardFn, samples: Samples) -> np.ndarray:
    """Asks a reward function, with the token ids where its signature takes them.

    Returns: what the function gives: float32 [B], or [B, K] of K functions.
    """
    texts = samples.prompts, samples.completions, samples.rows
    if "samples" in inspect.signature(function).parameters:
        return function(*texts, samples=samples)
    return function(*texts)


def each_reward(functions: Sequence[RewardFn]) -> RewardFn:
    """Reward functions as one that gives their rewards beside each other, [B, K]."""

    def stacked(prompts, completions, rows, *, samples: Samples | None = None):
        def ask(function):
            if samples is None:
                return function(prompts, completions, rows)
            return reward_of(function, samples)

        return np.column_stack([ask(function) for function in functions])

    return stacked
