"""Conversations to token ids and masks, by the tokenizer's chat template.

A template that marks `{% generation %}` says itself which tokens are the
assistant's. For any other, the text of a turn is what the template adds to the
conversation before it, and it is checked that the template only ever adds.

Many templates know nothing of tools, and one that passes over a turn says nothing about
it. So the system's and the tools' turns, the calls and the tools are put in once more
under names that occur nowhere else, and must be found in the text.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jalign.data.messages import Messages
from jalign.data.rows import RowError, Share, alone, attempt, encode_some
from jalign.data.special_tokens import (
    GENERATION_TAG,
    Tokenizer,
    end_texts,
    ensure_chat_template,
)
from jalign.data.templates import apply_template, render, render_prompt, template_of
from jalign.data.tokenizer import Spans, encode_spans


class Chat(NamedTuple):
    """A conversation to encode.

    Attributes:
      messages: all turns.
      prompt: the leading turns that are never trained; may be empty.
      first_turn: index of the first turn of the completion. One less than the length
        of the prompt where that turn continues the prompt's last one (a prefill).
      template_args: extra variables for the template.
      untrained: indices of turns of which no token is trained, though others are.
      assistant_only: train the assistant's turns, up to and with their EOS; otherwise
        all that follows the prompt.
    """

    messages: Messages
    prompt: Messages
    first_turn: int
    template_args: dict[str, Any]
    untrained: Sequence[int] = ()
    assistant_only: bool = True


def join_turns(prompt: Messages, completion: Messages) -> tuple[Messages, int]:
    """All turns, and the index of the completion's first; a prefill is continued."""
    if not prompt or (prompt[-1]["role"], completion[0]["role"]) != ("assistant",) * 2:
        return [*prompt, *completion], len(prompt)
    first, *rest = completion
    content = prompt[-1]["content"] + first["content"]
    return [*prompt[:-1], {**first, "content": content}, *rest], len(prompt) - 1


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Chat | RowError], share: Share = alone
) -> list[tuple[np.ndarray, np.ndarray] | RowError]:
    """Encodes conversations to (ids, mask), or to the reason why one cannot be.

    Args:
      tokenizer: gets the default template if it has none.
      chats: conversations; tokens of `Chat.prompt` are never trained.
      share: of the templating and tokenizing.
    """
    if not chats:
        return []
    ensure_chat_template(tokenizer)
    ends = end_texts(tokenizer)
    seen: Seen = {}

    def checked(chat: Chat) -> Chat:
        check_written(tokenizer, chat.messages, chat.template_args, seen)
        return chat

    def encode(good: list[Chat]) -> list[tuple[np.ndarray, np.ndarray] | RowError]:
        texts = [attempt(_text_and_spans, tokenizer, chat, ends) for chat in good]
        return encode_some(texts, partial(encode_spans, tokenizer))

    # Not shared: what is found of a conversation holds for later ones of its shape.
    found = encode_some(chats, lambda good: [attempt(checked, chat) for chat in good])
    return encode_some(found, partial(share, encode))


Write = Callable[..., str]  # turns -> the templated text, as `render`


def _text_and_spans(
    tokenizer: Tokenizer, chat: Chat, ends: Sequence[str]
) -> tuple[str, Spans]:
    write = partial(render, tokenizer, args=chat.template_args)
    text, start = write(chat.messages), 0
    if chat.prompt:
        goes_on = chat.messages[chat.first_turn]["role"] == "assistant"
        prompt = render_prompt if goes_on else render
        before = prompt(tokenizer, chat.prompt, chat.template_args)
        start = _length_of_prefix(text, before, len(chat.prompt))
    if not chat.assistant_only:
        spans = [(0, len(text))]
    elif GENERATION_TAG.search(template_of(tokenizer, chat.template_args)):
        spans = _marked_spans(tokenizer, chat, text, ends)
    else:
        spans = _added_spans(write, chat, text, ends)
    spans = [(max(a, start), b) for a, b in spans]
    for turn in chat.untrained:
        spans = _without(spans, *_turn_span(write, chat, text, turn, ends))
    return text, [(a, _end_of_turn(text, a, b, ends)) for a, b in spans if b > a]


def _without(spans: Spans, start: int, end: int) -> Spans:
    """The spans less what lies in [start, end)."""
    return [
        (a, b)
        for first, last in spans
        for a, b in ((first, min(last, start)), (max(first, end), last))
        if b > a
    ]


def _marked_spans(tokenizer: Tokenizer, chat: Chat, text: str, ends) -> Spans:
    """Where the template says {% generation %}, plus an end token right behind it."""
    encoded = apply_template(
        tokenizer,
        chat.messages,
        chat.template_args,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans = []
    for (start, end), marked in zip(
        encoded["offset_mapping"], encoded["assistant_masks"], strict=True
    ):
        if marked:
            follows = (len(token) for token in ends if text.startswith(token, end))
            spans.append((start, end + max(follows, default=0)))
    return spans


def _added_spans(write: Write, chat: Chat, text: str, ends) -> Spans:
    """Per assistant turn: from the generation prompt to the end of the turn."""
    turns = range(chat.first_turn, len(chat.messages))
    spoken = [i for i in turns if chat.messages[i]["role"] == "assistant"]
    if 0 in spoken:
        raise RowError("messages", "starts with an assistant turn")
    return [
        _turn_span(write, chat, text, i, ends, generation_prompt=True) for i in spoken
    ]


def _turn_span(
    write: Write, chat: Chat, text: str, turn: int, ends, **options: bool
) -> tuple[int, int]:
    """What the template writes for a turn, behind what `options` say."""
    before = write(chat.messages[:turn], **options) if turn else ""
    start = _length_of_prefix(text, before, turn)
    if turn == len(chat.messages) - 1:
        return start, len(text)
    after = write(chat.messages[: turn + 1])
    if text.startswith(after):
        return start, len(after)
    # Some templates (Qwen3's) write a turn differently once others follow it.
    found = [(at, end) for end in ends if (at := text.find(end, start)) >= 0]
    if not found:
        _length_of_prefix(text, after, turn + 1)
    at, end = min(found)
    return start, at + len(end)


def _length_of_prefix(text: str, prefix: str, turns: int) -> int:
    if text.startswith(prefix):
        return len(prefix)
    raise RowError(
        "(chat template)",
        f"rewrites the first {turns} turns when others follow, so the assistant's "
        "tokens cannot be told apart; pass assistant_only=False, or mark them in "
        "the template with {% generation %}",
    )


def _end_of_turn(text: str, start: int, end: int, ends: Sequence[str]) -> int:
    """Leaves out white space behind the end token: sampling stops before it."""
    stripped = text[start:end].rstrip()
    return start + len(stripped) if stripped.endswith(tuple(ends)) else end


Seen = dict[str, tuple[str, str] | None]
"""What was found of conversations of the same shape: (field, reason) or None."""

_MARK = "jalign{}mark"  # letters and digits: no template trims or escapes them
_CHECKED = ("system", "developer", "tool")


def check_written(
    tokenizer: Tokenizer,
    messages: Messages,
    args: dict[str, Any],
    seen: Seen,
) -> None:
    """Raises RowError for a turn, a call or tools that the template does not write.

    What the assistant says is not looked at: templates leave earlier thoughts out.

    Args:
      tokenizer: with the template.
      messages, args: as they are to be rendered.
      seen: of the template; each shape of a conversation is rendered but once.
    """
    calls = any(turn.get("tool_calls") for turn in messages)
    special = calls or any(turn["role"] in _CHECKED for turn in messages)
    if not special and not args.get("tools"):
        return
    shape = _shape(messages, args)
    if shape not in seen:
        seen[shape] = _unwritten(tokenizer, messages, args)
    if (found := seen[shape]) is not None:
        raise RowError(*found)


def _unwritten(tokenizer, messages: Messages, args: dict) -> tuple[str, str] | None:
    marked, wanted = [], []
    for i, turn in enumerate(messages):
        turn, marks = _marked_turn(turn, i)
        marked.append(turn)
        wanted += [(mark, f"messages[{i}]", what) for mark, what in marks]
    tools = [
        _marked_name(tool, f"T{i}") for i, tool in enumerate(args.get("tools", []))
    ]
    try:
        text = render(tokenizer, marked, {**args, "tools": tools} if tools else args)
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
