"""The prompt and the answers of a row, as its layout has them: texts or turns."""

from typing import Any

from jalign.data.messages import (
    Messages,
    check_unicode,
    kind_of,
    parse_messages,
    says_something,
)
from jalign.data.row_layouts import TURNS, Layout, is_blank
from jalign.data.rows import RowError

Text = str | Messages


def conversation(row: dict, layout: Layout) -> Messages:
    """The row's conversation, behind the system's turn."""
    name = layout.turns or ""
    turns = parse_messages(row[name], name)
    for other in TURNS:
        if other != name and not is_blank(row.get(other)):
            _require_same(turns, row[other], name, other)
    return with_system(turns, row, layout)


def _require_same(turns: Messages, value: Any, name: str, other: str) -> None:
    try:
        same = parse_messages(value, other) == turns
    except RowError:
        same = False
    if not same:
        raise RowError(
            other,
            f"says another thing than {name}, which goes before it: leave one out by "
            f"--columns ignore={other} or ignore={name}",
        )


def prompt_of(row: dict, layout: Layout) -> Text:
    """The prompt: as it stands, or as turns with the system's and the history."""
    name = layout.prompt[0]
    if isinstance(row[name], list):
        return with_system(parse_messages(row[name], name), row, layout)
    return prompt_turns(row, layout) if _is_chat(layout) else string(row, name)


def prompt_turns(row: dict, layout: Layout) -> Messages:
    """A prompt of strings as turns: the system's, the history, the user's."""
    text, system = asked_text(row, layout), _system(row, layout)
    require_content(text, layout.prompt[0])
    start = [{"role": "system", "content": system}] if system else []
    return [*start, *_history(row), {"role": "user", "content": text}]


def asked_text(row: dict, layout: Layout) -> str:
    """What the user says: the prompt's columns, below each other."""
    texts = [string(row, name) for name in layout.prompt]
    return "\n\n".join(text for text in texts if text.strip())


def answers(row: dict, layout: Layout) -> list[Any]:
    """The answers; as turns where the prompt is a conversation."""
    texts = [_text(row, name) for name in layout.answers]
    for name, text in zip(layout.answers, texts, strict=True):
        require_content(text, name)
    prompt = row[layout.prompt[0]] if layout.prompt else None
    if prompt is None or not (_is_chat(layout) or isinstance(prompt, list)):
        return texts
    return [
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for text in texts
    ]


def with_system(turns: Any, row: dict, layout: Layout) -> Any:
    """A conversation behind the system's turn, of which there is one."""
    if not is_blank(row.get("history")):
        raise RowError("history", "stands beside a conversation: put its turns there")
    text, name = _system(row, layout), layout.system or ""
    if not text:
        return turns
    if isinstance(turns, str):
        raise RowError(name, "needs a prompt column, or conversations")
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": text}, *turns]
    if turns[0]["content"].strip() != text.strip():
        raise RowError(name, "says another thing than the system's turn")
    return turns


def _system(row: dict, layout: Layout) -> str:
    blank = layout.system is None or is_blank(row[layout.system])
    return "" if blank else string(row, layout.system or "")


def _is_chat(layout: Layout) -> bool:
    """Whether a prompt of strings is the user's turn of a conversation."""
    return bool(layout.prompt[:1] != ("prompt",) or layout.system or layout.history)


def _history(row: dict) -> Messages:
    """LLaMA-Factory's [[user's text, answer], ...] as turns."""
    turns, value = [], row.get("history")
    if is_blank(value):
        return turns
    for i, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError(f"history[{i}]", "is not a pair of user's text and answer")
        pairs = zip(("user", "assistant"), pair, strict=True)
        turns += [{"role": role, "content": text} for role, text in pairs]
    return turns


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


def string(row: dict, field: str) -> str:
    """A column that must hold text."""
    value = row[field]
    if not isinstance(value, str):
        raise RowError(field, f"is {kind_of(value)}, not a string")
    check_unicode(value, field)
    return value


def require_content(value: Text, field: str) -> None:
    """Raises RowError for a text or turns that say nothing, or without an answer."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(field, "empty")
        return
    if not value or not any(says_something(turn) for turn in value):
        raise RowError(field, "empty")
    require_answer(value, field)


def require_answer(turns: Messages, field: str) -> None:
    """At least one answer, and none empty."""
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(field, "has no assistant turn to train on")
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and not says_something(turn):
            raise RowError(f"{field}[{i}].content", "empty")
