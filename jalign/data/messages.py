"""Messages of a conversation, checked and brought to one form."""

from typing import Any

from jalign.data.rows import RowError, parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, Any]]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def parse_messages(value: Any, field: str) -> Messages:
    """A list of {"role", "content", ...} with string contents, from any known form.

    ShareGPT's {"from", "value"} are renamed, {"input", "output"} are two turns. Null
    keys are left out at every depth, typed text parts joined, arguments of tool calls
    decoded. A turn that is not to be trained (`weight: 0` or `train: false`) is marked
    by `train: False`; the marks of all others are left out.

    Raises: RowError.
    """
    if not isinstance(value, list):
        raise RowError(field, f"is {kind_of(value)}, not a list of messages")
    if not value:
        raise RowError(field, "is an empty list")
    turns: Messages = []
    for i, item in enumerate(value):
        name = f"{field}[{i}]"
        if isinstance(item, dict) and {"input", "output"} <= item.keys():
            turns += _exchange(item, name, first=not turns)
        else:
            turns.append(_message(item, name))
    return turns


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
    marks = {"weight": item.pop("weight", 1), "train": item.pop("train", True)}
    texts = {"user": "input", "assistant": "output"}
    system = item.pop("system", "")
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
    if not _pop_trained(marks, field):
        turns[-1]["train"] = False
    return turns


def _message(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(field, f"is {kind_of(value)}, not a message")
    message = without_nulls(value)
    if "role" not in message and "from" in message:  # ShareGPT
        role = message.pop("from")
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            raise RowError(f"{field}.from", f"unknown speaker {role!r}")
        message = {"role": _SHAREGPT_ROLES[role], **message}
        message["content"] = message.pop("value", None)
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{field}.role", f"is {role!r}, not one of {', '.join(ROLES)}")
    if not _pop_trained(message, field):
        message["train"] = False
    calls = _tool_calls(message.pop("tool_calls", None), f"{field}.tool_calls")
    if calls:
        message["tool_calls"] = calls
    if message.get("content") is None and calls:
        return {**message, "content": ""}
    return {**message, "content": _content(message.get("content"), f"{field}.content")}


def _pop_trained(message: dict[str, Any], field: str) -> bool:
    """Takes `weight` and `train` out; whether the turn may be trained."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1):
        raise RowError(f"{field}.weight", f"is {weight!r}; only 0 and 1 are supported")
    if not isinstance(train, bool):
        raise RowError(f"{field}.train", f"is {kind_of(train)}, not a boolean")
    return train and weight == 1


def _tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls whose arguments are objects; a string of JSON is decoded, once."""
    if value is None:
        return []
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
        try:
            value = parse_json(value or "{}")
        except (ValueError, RecursionError) as error:
            raise RowError(field, f"broken JSON: {error}") from None
        if isinstance(value, str):
            raise RowError(field, "is JSON in JSON in a string: encode it once")
    if not isinstance(value, dict):
        raise RowError(field, f"is {kind_of(value)}, not an object")
    return {**call, "arguments": value}


def _content(value: Any, field: str) -> str:
    if value is None:
        raise RowError(field, "missing or null")
    if isinstance(value, list):  # typed parts; only text ones can be read here
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in value):
            raise RowError(
                field, "holds parts other than text, which are not supported"
            )
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        raise RowError(field, f"is {kind_of(value)}, not a string")
    check_unicode(value, field)
    return value


def says_something(turn: dict[str, Any]) -> bool:
    """Whether a turn has content or calls a tool."""
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def check_unicode(text: str, field: str) -> None:
    """Raises RowError on a lone surrogate, which no tokenizer takes."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(field, "holds a lone surrogate, not valid Unicode") from None


def kind_of(value: Any) -> str:
    """The kind of a JSON value, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), type(value).__name__)
