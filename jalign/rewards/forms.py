"""The two forms of a reward function, jalign's and TRL's, told apart by its signature.

jalign's is called with three lists, `f(prompts, completions, rows)`. TRL's is called by
keyword, `f(prompts=..., completions=..., completion_ids=..., COLUMN=...)`, with a list
for every column of the data but `prompt` and `completion`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jalign.data.formats import Prompt, parse_prompt
from jalign.data.messages import plain_turns
from jalign.data.rows import RowError
from jalign.rewards.samples import Samples

BOTH = (
    "a reward function is f(prompts, completions, rows), or TRL's: "
    "f(completions, **kwargs) or f(prompts, completions, COLUMN, **kwargs), which has "
    "a parameter `completions` or `**kwargs`, and none called `rows`"
)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
# Columns that are not passed on: what was asked and sampled stands for them.
_REPLACED = {"prompt", "completion", "completion_ids"}


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
    if samples is None:
        sources = [source_of(p, r) for p, r in zip(prompts, rows, strict=True)]
        ids: list = [None] * len(rows)
    else:
        sources = [
            source or Prompt(text, {})
            for source, text in zip(samples.sources, samples.prompts, strict=True)
        ]
        ids = [list(map(int, row)) for row in samples.completion_ids]
    asked = [plain_turns(source.prompt) for source in sources]
    answers = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(asked, completions, strict=True)
    ]
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


def source_of(prompt: str, row: Mapping[str, Any]) -> Prompt:
    """The conversation that a row asks with; else the prompt's text."""
    try:
        found = parse_prompt(dict(row))
    except RowError:
        return Prompt(prompt, {})
    return found if isinstance(found.prompt, list) else Prompt(prompt, {})
