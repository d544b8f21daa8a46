"""Texts and messages of a conversation, checked and brought to one form."""

import re
from typing import Any

from jalign.data.rows import RowError, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, Any]]
Text = str | Messages
_SURROGATE = re.compile("[\ud800-\udfff]")  # a lone one, which no tokenizer takes

_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **{"human": "user", "function": "tool", "observation": "tool"},
}


def parse_messages(value: Any, field: str) -> Messages:
    """A list of {"role", "content", ...} with string contents, from any known form.

    ShareGPT's {"from", "value"} are renamed, {"input", "output"} are two turns. Null
    keys are left out at every depth, typed text parts joined, arguments of tool calls
    decoded. A turn that is not to be trained (`weight: 0` or `train: false`) is marked
    by `train: False`; the marks of all others are left out.

    Raises: RowError.
    """
    if not expect(value, list, field, "a list of messages"):
        raise RowError(field, "is an empty list")
    turns: Messages = []
    for i, item in enumerate(value):
        name = f"{field}[{i}]"
        if isinstance(item, dict) and {"input", "output"} <= item.keys():
            turns += _exchange(item, name, first=not turns)
        else:
            turns.append(_message(item, name))
    return turns


def parse_history(value: Any) -> Messages:
    """LLaMA-Factory's [[user's text, answer], ...] as turns. Raises: RowError."""
    turns: Messages = []
    for i, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError(f"history[{i}]", "is not a pair of user's text and answer")
        asked, answer = pair
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answer})
    return turns


def template_args(row: dict) -> dict[str, Any]:
    """Variables for the chat template: `chat_template_kwargs` and `tools`."""
    name = "chat_template_kwargs"
    args = expect(without_nulls(row.get(name) or {}), dict, name, "an object")
    tools = without_nulls(row.get("tools"))
    if isinstance(tools, str) and tools.strip():
        tools = _parse_json(tools, "tools")
    if not tools:
        return dict(args)
    if any(not isinstance(x, dict) for x in expect(tools, list, "tools", "a list")):
        raise RowError("tools", "holds what is not an object")
    return {**args, "tools": tools}


def without_nulls(value: Any) -> Any:
    """Without keys that hold null, at every depth; elements of lists are kept.

    The columns of Arrow (Parquet, save_to_disk) are united over the rows of a data set,
    so a null key there says that another row has the key. It is the same for JSON, so
    that a data set means one thing in whatever way it is stored.
    """
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def plain_turns(turns: Any) -> Any:
    """The turns as a template is given them, without `train`; a text as it is."""
    if isinstance(turns, str):
        return turns
    return [{k: v for k, v in turn.items() if k != "train"} for turn in turns]


def _exchange(value: dict[str, Any], field: str, *, first: bool) -> Messages:
    """{"input", "output"} as two turns, and before the first one `system` as another.

    `weight` and `train` mark the answer.
    """
    item = without_nulls(value)
    mark, system = _pop_mark(item, field), item.pop("system", "")
    texts = {"user": "input", "assistant": "output"}
    if system != "":
        if not first:
            raise RowError(f"{field}.system", "stands behind the first turn")
        texts = {"system": "system", **texts}
    unknown = sorted(map(str, item.keys() - {"input", "output"}))
    if unknown:
        raise RowError(f"{field}.{unknown[0]}", "is not read beside input and output")
    turns: Messages = [
        {"role": role, "content": _content(value[key], f"{field}.{key}")}
        for role, key in texts.items()
    ]
    turns[-1] |= mark
    return turns


def _message(value: Any, field: str) -> dict[str, Any]:
    message = without_nulls(expect(value, dict, field, "a message"))
    if "role" not in message and "from" in message:  # ShareGPT
        role = message.pop("from")
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            raise RowError(f"{field}.from", f"unknown speaker {role!r}")
        message = {"role": _SHAREGPT_ROLES[role], **message}
        message["content"] = message.pop("value", None)
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{field}.role", f"is {role!r}, not one of {', '.join(ROLES)}")
    message |= _pop_mark(message, field)
    content = message.pop("content", None)
    if calls := _tool_calls(message.pop("tool_calls", []), f"{field}.tool_calls"):
        message["tool_calls"] = calls
        content = "" if content is None else content
    return {**message, "content": _content(content, f"{field}.content")}


def _pop_mark(message: dict[str, Any], field: str) -> dict[str, bool]:
    """Takes `weight` and `train` out: {"train": False} if the turn is not trained."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1):
        raise RowError(f"{field}.weight", f"is {weight!r}; only 0 and 1 are supported")
    trained = expect(train, bool, f"{field}.train", "a boolean") and weight == 1
    return {} if trained else {"train": False}


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects; a string of JSON is decoded, once."""
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise RowError(field, "is not a list of objects")
    calls = []
    for i, call in enumerate(value):
        where = f"{field}[{i}]"
        call, function = _decoded(call, where), call.get("function")
        if isinstance(function, dict):
            call = {**call, "function": _decoded(function, f"{where}.function")}
        calls.append(call)
    return calls


def _decoded(call: dict[str, Any], field: str) -> dict[str, Any]:
    if "arguments" not in call:
        return call
    field, value = f"{field}.arguments", call["arguments"]
    if isinstance(value, str):
        value = _parse_json(value or "{}", field)
        if isinstance(value, str):
            raise RowError(field, "is JSON in JSON in a string: encode it once")
    return {**call, "arguments": expect(value, dict, field, "an object")}


def _parse_json(text: str, field: str) -> Any:
    """A JSON text in a column to a value. Raises: RowError."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(field, f"broken JSON: {error}") from None


def _content(value: Any, field: str) -> str:
    if isinstance(value, list):  # typed parts; only text ones can be read here
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in value):
            raise RowError(
                field, "holds parts other than text, which are not supported"
            )
        value = "".join(str(part.get("text") or "") for part in value)
    return string(value, field)


def string(value: Any, field: str, words: str = "a string") -> str:
    """A text, which must be there and valid Unicode. Raises: RowError."""
    if value is None:
        raise RowError(field, "missing or null")
    if _SURROGATE.search(expect(value, str, field, words)):
        raise RowError(field, "holds a lone surrogate, not valid Unicode")
    return value


def text_or_turns(value: Any, field: str) -> Text:
    """A column that holds text or messages. Raises: RowError."""
    if isinstance(value, list):
        return parse_messages(value, field)
    return string(value, field, "a string or a list of messages")


def expect(value: Any, kind: Any, field: str, words: str) -> Any:
    """The value, if it is of a kind. Raises RowError with the kind in words."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RowError(field, f"is {kind_of(value)}, not {words}")
    return value


def says_something(turn: dict[str, Any]) -> bool:
    """Whether a turn has content or calls a tool."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def require_content(value: Any, field: str) -> Any:
    """The text or turns, if they say something and have an answer. Raises: RowError."""
    is_text = isinstance(value, str)
    if not (value.strip() if is_text else any(map(says_something, value))):
        raise RowError(field, "empty")
    if not is_text:
        require_answer(value, field)
    return value


def require_answer(turns: Messages, field: str) -> None:
    """At least one answer, and none empty."""
    answers = [(i, turn) for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise RowError(field, "has no assistant turn to train on")
    for i, turn in answers:
        if not says_something(turn):
            raise RowError(f"{field}[{i}].content", "empty")


def kind_of(value: Any) -> str:
    """The kind of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), type(value).__name__)
