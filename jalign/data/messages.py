"""Messages of a conversation, checked and brought to one form."""

from typing import Any

from jalign.data.rows import RowError

ROLES = ("system", "developer", "user", "assistant", "tool")
Messages = list[dict[str, Any]]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
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

    ShareGPT's {"from", "value"} are renamed, null keys and typed text parts resolved.
    Raises: RowError.
    """
    if not isinstance(value, list):
        raise RowError(field, f"is {kind_of(value)}, not a list of messages")
    if not value:
        raise RowError(field, "is an empty list")
    return [_message(m, f"{field}[{i}]") for i, m in enumerate(value)]


def _message(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError(field, f"is {kind_of(value)}, not a message")
    # Columns of a data set are united over its rows: null means absent.
    message = {key: item for key, item in value.items() if item is not None}
    if "role" not in message and "from" in message:  # ShareGPT
        role = message.pop("from")
        if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
            raise RowError(f"{field}.from", f"unknown speaker {role!r}")
        message = {"role": _SHAREGPT_ROLES[role], **message}
        message["content"] = message.pop("value", None)
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{field}.role", f"is {role!r}, not one of {', '.join(ROLES)}")
    if message.get("content") is None and message.get("tool_calls"):
        return {**message, "content": ""}
    return {**message, "content": _content(message.get("content"), f"{field}.content")}


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
