"""Whether a chat template writes what it is given: many know nothing of tools.

A template that passes over a turn says nothing about it. So the system's and the
tools' turns, the calls and the tools are put in once more under names that occur
nowhere else, and must be found in the text.
"""

import json
from collections.abc import Callable
from typing import Any

from jalign.data.messages import Messages
from jalign.data.rows import RowError

Seen = dict[str, tuple[str, str] | None]
"""What was found of conversations of the same shape: (field, reason) or None."""

_MARK = "jalign{}mark"  # letters and digits: no template trims or escapes them
_CHECKED = ("system", "developer", "tool")


def check_written(
    render: Callable[[Messages, dict[str, Any]], str],
    messages: Messages,
    args: dict[str, Any],
    seen: Seen,
) -> None:
    """Raises RowError for a turn, a call or tools that the template does not write.

    What the assistant says is not looked at: templates leave earlier thoughts out.

    Args:
      render: (messages, variables) -> the templated text.
      messages, args: as they are to be rendered.
      seen: of the template; each shape of a conversation is rendered but once.
    """
    calls = any(turn.get("tool_calls") for turn in messages)
    special = calls or any(turn["role"] in _CHECKED for turn in messages)
    if not special and not args.get("tools"):
        return
    shape = _shape(messages, args)
    if shape not in seen:
        seen[shape] = _unwritten(render, messages, args)
    if (found := seen[shape]) is not None:
        raise RowError(*found)


def _unwritten(render, messages: Messages, args: dict) -> tuple[str, str] | None:
    marked, wanted = [], []
    for i, turn in enumerate(messages):
        turn, marks = _marked_turn(turn, i)
        marked.append(turn)
        wanted += [(mark, f"messages[{i}]", what) for mark, what in marks]
    tools = [
        _marked_name(tool, f"T{i}") for i, tool in enumerate(args.get("tools", []))
    ]
    try:
        text = render(marked, {**args, "tools": tools} if tools else args)
    except RowError:  # the row itself is refused as well, in words of its own
        return None
    advice = "use a model whose template does, or leave it out of the data"
    for mark, field, what in wanted:
        if mark not in text:
            return field, f"the chat template does not write {what}: {advice}"
    named = [i for i, tool in enumerate(args.get("tools", [])) if tool != tools[i]]
    if named and not any(_MARK.format(f"T{i}") in text for i in named):
        return "tools", f"the chat template writes none of them: {advice}"
    return None


def _marked_turn(turn: dict, i: int) -> tuple[dict, list[tuple[str, str]]]:
    """The turn under names of its own, and what they are: [(name, what it is)]."""
    marks = []
    role, calls = turn["role"], turn.get("tool_calls", [])
    # An empty system's turn may be left out, but not that a tool said nothing.
    if role in _CHECKED and (role == "tool" or turn["content"].strip()):
        marks.append((_MARK.format(i), f"the {role}'s turn"))
        turn = {**turn, "content": marks[0][0]}
    marked = [_marked_name(call, f"{i}C{n}") for n, call in enumerate(calls)]
    for n, call in enumerate(calls):
        if marked[n] != call:
            mark = _MARK.format(f"{i}C{n}")
            marks.append((mark, f"the name of tool call {n}"))
            if _arguments(call):
                marks.append((mark + "argument", f"the arguments of tool call {n}"))
    return ({**turn, "tool_calls": marked} if calls else turn), marks


def _marked_name(value: dict[str, Any], mark: str) -> dict[str, Any]:
    """A call or a tool of another name and with one more argument, if it has any."""
    function, name = value.get("function"), _MARK.format(mark)
    if isinstance(function, dict):
        return {**value, "function": _marked_name(function, mark)}
    if arguments := _arguments(value):
        value = {**value, "arguments": {**arguments, f"{name}argument": ""}}
    return {**value, "name": name} if "name" in value else value


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Of a call, decoded; none of what has others, as a tool its parameters."""
    function = call.get("function", call)
    found = function.get("arguments") if isinstance(function, dict) else None
    return found if isinstance(found, dict) else {}


def _shape(messages: Messages, args: dict[str, Any]) -> str:
    """All but what is said: a template may go by the rest."""
    turns = [
        [turn["role"], bool(turn["content"].strip()), sorted(turn)]
        + [
            [sorted(call), bool(_arguments(call))]
            for call in turn.get("tool_calls", [])
        ]
        for turn in messages
    ]
    rest = {name: value for name, value in args.items() if name != "tools"}
    shape = [turns, rest, bool(args.get("tools"))]
    return json.dumps(shape, sort_keys=True, default=str)
