"""Sampled completions, as a reward function of either form is given them.

The two forms, jalign's and TRL's, are told apart by the signature. jalign's is called
with three lists, `f(prompts, completions, rows)`. TRL's is called by keyword,
`f(prompts=..., completions=..., completion_ids=..., COLUMN=...)`, with a list for every
column of the data but `prompt` and `completion`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.data import PromptExample
from jalign.data.formats import Prompt, parse_prompt
from jalign.data.messages import plain_turns
from jalign.data.rows import attempt

Tokens = Sequence[int] | np.ndarray
RewardFn = Callable[..., np.ndarray]
"""(prompts, completions, rows), each a list of B -> float32 [B]. One that names the
keyword `samples`, as those of `model_reward` and `checked`, is also given the whole
`Samples`, token ids among them. NaN is a row that is not judged (`checked`)."""

BOTH = (
    "a reward function is f(prompts, completions, rows), or TRL's: "
    "f(completions, **kwargs) or f(prompts, completions, COLUMN, **kwargs), which has "
    "a parameter `completions` or `**kwargs`, and none called `rows`"
)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Columns that are not passed on: what was asked and sampled stands for them.
_REPLACED = {"prompt", "completion", "completion_ids"}


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
        if samples is None:
            given = [function(prompts, completions, rows) for function in functions]
        else:
            given = [reward_of(function, samples) for function in functions]
        return np.column_stack(given)

    return stacked


def samples_of_texts(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping]
) -> Samples:
    """Samples without ids; a prompt is the conversation that its row asks with, if it
    does, else its text."""
    sources: list[Prompt | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        found = attempt(parse_prompt, dict(row))
        if isinstance(found, Prompt) and isinstance(found.prompt, list):
            sources[i] = found
    whole = [dict(row) for row in rows]
    return Samples(list(prompts), list(completions), whole, sources, (), (), None, ())


def sources_of(samples: Samples) -> list[Prompt]:
    """The prompts themselves: their texts where nothing else is known."""
    known = zip(samples.sources, samples.prompts, strict=True)
    return [source or Prompt(text, {}) for source, text in known]


def takes_columns(function: Callable, name: str) -> bool:
    """Whether a function is of TRL's form; False for jalign's own.

    TRL's has a parameter `completions` or `**kwargs`, and none called `rows`. Any other
    that can be called with three lists is jalign's, whatever their names; but not
    `(*args, **kwargs)`, which fits both and hides what is behind it.

    Raises: ValueError with both forms for a signature that is neither.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(f"reward {name}: its signature is not known; {BOTH}") from None
    kinds = {p.kind for p in signature.parameters.values()}
    any_keyword = inspect.Parameter.VAR_KEYWORD in kinds
    of_both = any_keyword and inspect.Parameter.VAR_POSITIONAL in kinds
    named = {p.name for p in signature.parameters.values() if p.kind in _NAMED}
    if "rows" not in named:
        if "completions" in named or (any_keyword and not of_both):
            return True
        if of_both:
            raise ValueError(
                f"reward {name}{signature} may be of either form; a wrapper says of "
                f"which by functools.wraps: {BOTH}"
            )
    try:
        signature.bind([], [], [])
    except TypeError:
        raise ValueError(f"reward {name}{signature} is neither form: {BOTH}") from None
    return False


def columns_batch(
    prompts: Sequence[str],
    completions: Sequence[str],
    rows: Sequence[Mapping],
    *,
    samples: Samples | None,
) -> list[list]:
    """Prompts, completions, rows and ids as TRL gives them, B each.

    Where the prompt is a conversation it is a list of messages, and the completion a
    list of the assistant's one. The ids are None without samples.
    """
    known = samples or samples_of_texts(prompts, completions, rows)
    asked = [plain_turns(source.prompt) for source in sources_of(known)]
    answers = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(asked, completions, strict=True)
    ]
    ids = [list(map(int, row)) for row in known.completion_ids] or [None] * len(rows)
    return [asked, answers, list(rows), ids]


def column_arguments(
    function: Callable, name: str, prompts, completions, rows, ids
) -> dict[str, Any]:
    """The keyword arguments of a function of TRL's form, as many as it takes.

    A column that a row lacks is None there, as in Arrow. What TRL passes of its trainer
    (`trainer_state`, `log_extra`, `log_metric`) does not exist here.

    Raises: ValueError naming a parameter that is no column, or a column that is called
      as what was sampled.
    """
    given: dict[str, Any] = {"prompts": prompts, "completions": completions}
    if None not in ids:
        given["completion_ids"] = ids
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if hidden := [c for c in columns if c in ("prompts", "completions")]:
        raise ValueError(
            f"reward {name}: the data has a column {hidden[0]!r}, the name under which "
            "what was sampled is given; rename it, or take (prompts, completions, rows)"
        )
    for column in columns:
        if column not in _REPLACED:
            given[column] = [row.get(column) for row in rows]
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in _NAMED]
    missing = [p.name for p in named if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(
            f"reward {name} asks for {', '.join(missing)}, and the data has no such "
            f"column ({', '.join(columns) or 'none'}); whole rows are given to "
            "f(prompts, completions, rows)"
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    return {p.name: given[p.name] for p in named if p.name in given}
