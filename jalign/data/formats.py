"""Rows of every known layout to the formats of TRL, each row on its own.

Standard rows hold strings, conversational ones lists of {"role", "content"}.
`row_layouts` says which columns are read; docs/data.md has the table. A row is never
mended silently: what does not fit raises `RowError` with the field and the reason.
"""

import math
from typing import Any, NamedTuple

from jalign.data import compose, row_layouts as layouts
from jalign.data.compose import Text
from jalign.data.messages import kind_of, plain_turns, without_nulls
from jalign.data.rows import RowError, parse_json


class Exchange(NamedTuple):
    """A prompt with what follows; both are strings or both are lists of messages.

    Attributes:
      prompt: None for a `text` or `messages` row, which has no part of its own for it.
      completion: what the model is to produce, or the whole text or conversation.
      template_args: extra variables for the chat template (`tools` among them).
    """

    prompt: Text | None
    completion: Text
    template_args: dict[str, Any]


class Preference(NamedTuple):
    """Two completions of one prompt; `margin` is how much better chosen was judged."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float
    template_args: dict[str, Any]


class Prompt(NamedTuple):
    """A prompt to be completed by sampling."""

    prompt: Text
    template_args: dict[str, Any]


def parse_sft(row: dict) -> Exchange:
    """A conversation, a prompt with its completion, or a text.

    Raises: RowError.
    """
    layout, args = layouts.sft_layout(row), template_args(row)
    exchange = _exchange(row, layout, args)
    _refuse_args(exchange.completion, args)
    return exchange


def _exchange(row: dict, layout: layouts.Layout, args: dict[str, Any]) -> Exchange:
    if layout.turns:
        turns = compose.conversation(row, layout)
        compose.require_answer(turns, layout.turns)
        return Exchange(None, turns, args)
    if layout.text:
        text = compose.string(row, layout.text)
        compose.require_content(text, layout.text)
        return Exchange(None, text, args)
    prompt: Any = compose.prompt_of(row, layout)
    (completion,) = compose.answers(row, layout)
    _same_kind(prompt, completion, layout.answers[0])
    _refuse_repeat(row, layout, prompt, completion)
    if not layouts.is_blank(row.get("history")):
        # Its answers are trained, as LLaMA-Factory has it.
        return Exchange(None, [*prompt, *completion], args)
    return Exchange(prompt, completion, args)


def parse_preference(row: dict) -> Preference:
    """`chosen` + `rejected`, with `prompt` or with the prompt at the start of both.

    Raises: RowError; also where a completion is empty or both are equal.
    """
    layout, args = layouts.preference_layout(row), template_args(row)
    prompt, chosen, rejected = _split_preference(row, layout)
    _refuse_equal(layout, chosen, rejected)
    _refuse_args(chosen, args)
    return Preference(prompt, chosen, rejected, _margin(row), args)


def _split_preference(row: dict, layout: layouts.Layout) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected apart, whichever way the row holds the prompt."""
    chosen, rejected = compose.answers(row, layout)
    _same_kind(chosen, rejected, layout.answers[1])
    if not layout.prompt:
        _refuse_equal(layout, chosen, rejected)
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        return compose.with_system(prompt, row, layout), chosen, rejected
    name, *_ = layout.prompt
    if isinstance(row[name], list) or isinstance(chosen, str):
        prompt = compose.prompt_of(row, layout)
        _same_kind(prompt, chosen, layout.answers[0])
        _refuse_repeat(row, layout, prompt, chosen)
        return prompt, chosen, rejected
    if _answers_only(chosen) and _answers_only(rejected):
        _refuse_repeat(row, layout, [], chosen)
        return compose.prompt_turns(row, layout), chosen, rejected
    # As in UltraFeedback: the string repeats a turn of the conversations.
    turns: Any
    turns, chosen, rejected = extract_prompt(chosen, rejected)
    text = compose.asked_text(row, layout).strip()
    if not any(turn["content"].strip() == text for turn in turns):
        raise RowError(name, "is no turn of the conversations")
    return compose.with_system(turns, row, layout), chosen, rejected


def _refuse_equal(layout: layouts.Layout, chosen: Text, rejected: Text) -> None:
    first, second = layout.answers
    if chosen == rejected:
        raise RowError(second, f"equals {first}")


def _answers_only(turns: Any) -> bool:
    return turns[0]["role"] == "assistant"


def _refuse_repeat(
    row: dict, layout: layouts.Layout, prompt: Text, answer: Text
) -> None:
    """Refuses answers that begin with the prompt once more."""
    name = layout.answers[0]
    if isinstance(prompt, list) and prompt and answer[: len(prompt)] == prompt:
        reason = f"repeats the turns of {layout.prompt[0]}; leave one of them out"
        raise RowError(name, reason)
    texts = [row[name] for name in (layout.prompt[0], *layout.answers)]
    if all(isinstance(text, str) for text in texts):
        asked, *rest = map(str.strip, texts)
        # One answer may well echo a word: "Hello" is answered by "Hello! ...".
        alone = len(rest) == 1 and len(asked.split()) < 2
        if not alone and all(_continues(asked, text) for text in rest):
            reason = f"begins with {layout.prompt[0]} once more; leave one of them out"
            raise RowError(name, reason)


def _continues(start: str, text: str) -> bool:
    """Whether a text is the start and more words."""
    if not start or not text.startswith(start) or len(text) == len(start):
        return False
    return not (start[-1].isalnum() and text[len(start)].isalnum())


def parse_prompt(row: dict) -> Prompt:
    """The prompt of any row, also of one with answers, which are left out: what
    `parse_preference` puts before two answers, and `parse_sft` before one.

    Of a conversation the trailing assistant turns are left out.
    Raises: RowError.
    """
    layout, args = layouts.prompt_layout(row), template_args(row)
    prompt = plain_turns(_asked(row, layout))
    _refuse_args(prompt, args)
    return Prompt(prompt, args)


def _asked(row: dict, layout: layouts.Layout) -> Text:
    if layout.answers:
        return _split_preference(row, layout)[0]
    if not layout.turns:
        return compose.prompt_of(row, layout)
    turns = compose.conversation(row, layout)
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError(layout.turns, "has no turn before the assistant's")
    return turns


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits the common start of two completions off as their prompt.

    Conversations are split between turns. Strings are split before a white space, so
    that no word is cut, and so that neither completion is empty; what the completions
    still share adds equally to both and cancels in every preference loss.
    """
    common = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        common += 1
    if isinstance(chosen, str) and isinstance(rejected, str):
        common = max(
            (i for i in range(common) if chosen[i].isspace() and chosen[i:].strip()
             and rejected[i:].strip()),
            default=0,
        )  # fmt: skip
    else:
        common = min(common, len(chosen) - 1, len(rejected) - 1)
    if common == 0:
        raise RowError("prompt", "missing, and chosen and rejected share no beginning")
    prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        compose.require_content(value, field)
    return prompt, chosen, rejected


def template_args(row: dict) -> dict[str, Any]:
    """Variables for the chat template: `chat_template_kwargs` and `tools`."""
    args = without_nulls(row.get("chat_template_kwargs") or {})
    if not isinstance(args, dict):
        raise RowError("chat_template_kwargs", f"is {kind_of(args)}, not an object")
    tools = without_nulls(row.get("tools"))
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except (ValueError, RecursionError) as error:
            raise RowError("tools", f"broken JSON: {error}") from None
    if tools and not isinstance(tools, list):
        raise RowError("tools", f"is {kind_of(tools)}, not a list")
    if any(not isinstance(tool, dict) for tool in tools or []):
        raise RowError("tools", "holds what is not an object")
    return {**args, "tools": tools} if tools else dict(args)


def _refuse_args(text: Text, args: dict[str, Any]) -> None:
    """Refuses variables for the chat template beside strings, which have none."""
    if args and isinstance(text, str):
        name = "tools" if "tools" in args else "chat_template_kwargs"
        raise RowError(
            name,
            "is for the chat template, which text does not go through: make messages "
            f"of the text, or leave the column out by --columns ignore={name}",
        )


def _same_kind(first: Text, second: Text, field: str) -> None:
    if isinstance(first, str) != isinstance(second, str):
        raise RowError(field, "mixes strings and lists of messages in one row")


def _margin(row: dict) -> float:
    value = row.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError("margin", f"is {kind_of(value)}, not a number")
    if not math.isfinite(value):
        raise RowError("margin", "is not finite")
    return float(value)
