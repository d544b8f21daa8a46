"""The row formats of TRL, detected and checked row by row.

Standard rows hold strings, conversational ones lists of {"role", "content"}.
See docs/data.md for the table. A row is never mended silently: what does not fit
raises `RowError` with the field and the reason.
"""

import json
import math
from typing import Any, NamedTuple

from jalign.data.messages import (
    Messages,
    check_unicode,
    kind_of,
    parse_messages,
    says_something,
)
from jalign.data.rows import RowError

Text = str | Messages


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
    """`messages`, `conversations`, `prompt` + `completion`, or `text`, in this order.

    Raises: RowError.
    """
    args = template_args(row)
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            turns = parse_messages(row[field], field)
            _require_answer(turns, field)
            return Exchange(None, turns, args)
    paired = row.get("prompt") is not None and "completion" in row
    if row.get("completion") is not None or paired:
        prompt = _text(row, "prompt")
        completion = _text(row, "completion")
        _same_kind(prompt, completion, "completion")
        _require_content(completion, "completion")
        return Exchange(prompt, completion, args)
    if row.get("text") is not None:
        text = row["text"]
        if not isinstance(text, str):
            raise RowError("text", f"is {kind_of(text)}, not a string")
        check_unicode(text, "text")
        _require_content(text, "text")
        return Exchange(None, text, args)
    expected = "messages, conversations, prompt + completion, or text"
    raise _unknown(row, expected)


def parse_preference(row: dict) -> Preference:
    """`chosen` + `rejected`, with `prompt` or with the prompt at the start of both.

    Raises: RowError; also where a completion is empty or both are equal.
    """
    if "chosen" not in row and "rejected" not in row:
        raise _unknown(row, "chosen + rejected, and optionally prompt")
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    _same_kind(chosen, rejected, "rejected")
    for field, value in (("chosen", chosen), ("rejected", rejected)):
        _require_content(value, field)
    if chosen == rejected:
        raise RowError("rejected", "equals chosen")
    prompt, chosen, rejected = _split_preference(row, chosen, rejected)
    return Preference(prompt, chosen, rejected, _margin(row), template_args(row))


def _split_preference(
    row: dict, chosen: Text, rejected: Text
) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected apart, whichever way the row holds the prompt."""
    if "prompt" not in row:
        return extract_prompt(chosen, rejected)
    prompt = _text(row, "prompt")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # As in UltraFeedback: the string repeats a turn of the conversations.
        parts = extract_prompt(chosen, rejected)
        turns: Any = parts[0]
        if not any(turn["content"].strip() == prompt.strip() for turn in turns):
            raise RowError("prompt", "is no turn of the conversations")
        return parts
    _same_kind(prompt, chosen, "chosen")
    if isinstance(prompt, list) and chosen[: len(prompt)] == prompt:
        raise RowError("chosen", "repeats the turns of prompt; leave one of them out")
    return prompt, chosen, rejected


def parse_prompt(row: dict) -> Prompt:
    """`prompt`; or a conversation, whose trailing assistant turns are left out.

    Raises: RowError.
    """
    args = template_args(row)
    for field in ("messages", "conversations"):
        if row.get("prompt") is None and row.get(field) is not None:
            turns = parse_messages(row[field], field)
            while turns and turns[-1]["role"] == "assistant":
                turns = turns[:-1]
            if not turns:
                raise RowError(field, "has no turn before the assistant's")
            return Prompt(turns, args)
    if "prompt" not in row:
        raise _unknown(row, "prompt, messages or conversations")
    return Prompt(_text(row, "prompt"), args)


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
        _require_content(value, field)
    return prompt, chosen, rejected


def template_args(row: dict) -> dict[str, Any]:
    """Variables for the chat template: `chat_template_kwargs` and `tools`."""
    args = row.get("chat_template_kwargs") or {}
    if not isinstance(args, dict):
        raise RowError("chat_template_kwargs", f"is {kind_of(args)}, not an object")
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError("tools", f"broken JSON: {error.msg}") from None
    if tools and not isinstance(tools, list):
        raise RowError("tools", f"is {kind_of(tools)}, not a list")
    return {**args, "tools": tools} if tools else dict(args)


def _text(row: dict, field: str) -> Text:
    value = row.get(field)
    if value is None:
        raise RowError(field, "missing or null")
    if isinstance(value, str):
        check_unicode(value, field)
        return value
    if isinstance(value, list):
        return parse_messages(value, field)
    raise RowError(field, f"is {kind_of(value)}, not a string or a list of messages")


def _require_answer(turns: Messages, field: str) -> None:
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(field, "has no assistant turn to train on")
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and not says_something(turn):
            raise RowError(f"{field}[{i}].content", "empty")


def _require_content(value: Text, field: str) -> None:
    if isinstance(value, str):
        if not value.strip():
            raise RowError(field, "empty")
        return
    if not value or not any(says_something(turn) for turn in value):
        raise RowError(field, "empty")
    _require_answer(value, field)


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


def _unknown(row: dict, expected: str) -> RowError:
    for field in expected.replace(",", " ").split():
        if field in row and row[field] is None:
            return RowError(field, "missing or null")
    keys = ", ".join(sorted(map(str, row))[:8]) or "none"
    return RowError("(row)", f"has the fields {keys}; expected {expected}")
