"""Conversations to token ids and masks, by the tokenizer's chat template.

A template that marks `{% generation %}` says itself which tokens are the
assistant's. For any other, the text of a turn is what the template adds to the
conversation before it, and it is checked that the template only ever adds.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jalign.data.clock import with_clock
from jalign.data.limits import MAX_TEXT, check_template, rendering
from jalign.data.messages import Messages
from jalign.data.rows import RowError
from jalign.data.special_tokens import GENERATION_TAG, Tokenizer, end_texts
from jalign.data.tokenizer import CHUNK, leading_ids
from jalign.data.written import Seen, check_written

logger = logging.getLogger("jalign.data")

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}"
    "{{ raise_exception('the default chat template knows no tool calls') }}"
    "{% endif %}"
    "{{ (message['role'] | capitalize) ~ ':\\n' ~ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% else %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
"""For tokenizers without a template: "User:\\nHi\\n\\nAssistant:\\nHello</s>"."""


class Chat(NamedTuple):
    """A conversation to encode.

    Attributes:
      messages: all turns.
      prompt: the leading turns that are never trained; may be empty.
      first_turn: index of the first turn of the completion. One less than the length
        of the prompt where that turn continues the prompt's last one (a prefill).
      template_args: extra variables for the template.
      untrained: indices of turns of which no token is trained, though others are.
    """

    messages: Messages
    prompt: Messages
    first_turn: int
    template_args: dict[str, Any]
    untrained: Sequence[int] = ()


def join_turns(prompt: Messages, completion: Messages) -> tuple[Messages, int]:
    """All turns, and the index of the completion's first; a prefill is continued."""
    if not prompt or (prompt[-1]["role"], completion[0]["role"]) != ("assistant",) * 2:
        return [*prompt, *completion], len(prompt)
    first, *rest = completion
    content = prompt[-1]["content"] + first["content"]
    return [*prompt[:-1], {**first, "content": content}, *rest], len(prompt) - 1


def ensure_chat_template(tokenizer: Tokenizer) -> None:
    """Sets the default template on a tokenizer without one, so that it is exported."""
    if tokenizer.chat_template:
        return
    bos = "{{ bos_token }}" if leading_ids(tokenizer) else ""
    tokenizer.chat_template = bos + DEFAULT_CHAT_TEMPLATE
    logger.warning("the tokenizer has no chat template; using jalign's plain one")


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    args: dict[str, Any],
    *,
    generation_prompt: bool = False,
    continue_final: bool = False,
) -> str:
    """The templated text.

    Raises: RowError with the template's own complaint, or for a text that is too long;
      ValueError for a template that cannot be compiled or takes too long, see
      `limits`.
    """
    check_template(tokenizer, args)
    with rendering(tokenizer):
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=with_clock(_template_of(tokenizer, args)),
            tokenize=False,
            add_generation_prompt=generation_prompt,
            continue_final_message=continue_final,
            **args,
        )
    if len(text) > MAX_TEXT:
        reason = f"writes {len(text)} characters, more than {MAX_TEXT}"
        raise RowError("(chat template)", reason)
    return text


def render_prompt(tokenizer: Tokenizer, prompt: Messages, args: dict[str, Any]) -> str:
    """The text up to where the assistant speaks, or goes on speaking."""
    if prompt[-1]["role"] == "assistant":
        return render(tokenizer, prompt, args, continue_final=True)
    return render(tokenizer, prompt, args, generation_prompt=True)


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Chat], *, assistant_only: bool
) -> list[tuple[np.ndarray, np.ndarray] | RowError]:
    """Encodes conversations to (ids, mask), or to the reason why one cannot be.

    Args:
      tokenizer: gets the default template if it has none.
      chats: conversations; tokens of `Chat.prompt` are never trained.
      assistant_only: train the assistant's turns, up to and with their EOS; otherwise
        all that follows the prompt.
    """
    if not chats:
        return []
    ensure_chat_template(tokenizer)
    ends = end_texts(tokenizer)
    results: list[Any] = []
    seen: Seen = {}
    write = partial(render, tokenizer)
    for chat in chats:
        try:
            check_written(write, chat.messages, chat.template_args, seen)
            results.append(_text_and_spans(tokenizer, chat, assistant_only, ends))
        except RowError as error:
            results.append(error)
    good = [i for i, item in enumerate(results) if not isinstance(item, RowError)]
    encoded = _encode_spans(tokenizer, [results[i] for i in good])
    for i, item in zip(good, encoded, strict=True):
        results[i] = item
    return results


Span = tuple[int, int]  # character offsets [start, end) into a text
Spans = list[Span]


def _text_and_spans(
    tokenizer: Tokenizer, chat: Chat, assistant_only: bool, ends: Sequence[str]
) -> tuple[str, Spans]:
    text = render(tokenizer, chat.messages, chat.template_args)
    spans_of, start = _everything, 0
    if assistant_only:
        marked = GENERATION_TAG.search(_template_of(tokenizer, chat.template_args))
        spans_of = _marked_spans if marked else _added_spans
    if chat.prompt:
        prompt = _prompt_text(tokenizer, chat)
        _require_prefix(text, prompt, len(chat.prompt))
        start = len(prompt)
    spans = [(max(a, start), b) for a, b in spans_of(tokenizer, chat, text, ends)]
    for turn in chat.untrained:
        spans = _without(spans, *_turn_span(tokenizer, chat, text, turn, ends))
    return text, [(a, _end_of_turn(text, a, b, ends)) for a, b in spans if b > a]


def _template_of(tokenizer: Tokenizer, args: dict[str, Any]) -> str:
    """The template that transformers takes: of several, that for tools, or default."""
    return tokenizer.get_chat_template(None, args.get("tools"))


def _prompt_text(tokenizer: Tokenizer, chat: Chat) -> str:
    closed = chat.messages[chat.first_turn]["role"] != "assistant"
    if closed:
        return render(tokenizer, chat.prompt, chat.template_args)
    return render_prompt(tokenizer, chat.prompt, chat.template_args)


def _turn_span(tokenizer: Tokenizer, chat: Chat, text: str, turn: int, ends) -> Span:
    """All that the template writes for a turn."""
    before = render(tokenizer, chat.messages[:turn], chat.template_args) if turn else ""
    _require_prefix(text, before, turn)
    return len(before), _turn_end(tokenizer, chat, text, turn, len(before), ends)


def _without(spans: Spans, start: int, end: int) -> Spans:
    """The spans less what lies in [start, end)."""
    return [
        (a, b)
        for first, last in spans
        for a, b in ((first, min(last, start)), (max(first, end), last))
        if b > a
    ]


def _everything(tokenizer: Tokenizer, chat: Chat, text: str, ends) -> Spans:
    return [(0, len(text))]


def _marked_spans(tokenizer: Tokenizer, chat: Chat, text: str, ends) -> Spans:
    """Where the template says {% generation %}, plus an end token right behind it."""
    template = _template_of(tokenizer, chat.template_args)
    with rendering(tokenizer):
        encoded = tokenizer.apply_chat_template(
            chat.messages,
            chat_template=with_clock(template),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **chat.template_args,
        )
    spans = []
    for (start, end), marked in zip(
        encoded["offset_mapping"], encoded["assistant_masks"], strict=True
    ):
        if marked:
            follows = (len(token) for token in ends if text.startswith(token, end))
            spans.append((start, end + max(follows, default=0)))
    return spans


def _added_spans(tokenizer: Tokenizer, chat: Chat, text: str, ends) -> Spans:
    """Per assistant turn: from the generation prompt to the end of the turn."""
    spans = []
    for i in range(chat.first_turn, len(chat.messages)):
        if chat.messages[i]["role"] != "assistant":
            continue
        if i == 0:
            raise RowError("messages", "starts with an assistant turn")
        before = render(
            tokenizer, chat.messages[:i], chat.template_args, generation_prompt=True
        )
        _require_prefix(text, before, i)
        end = _turn_end(tokenizer, chat, text, i, len(before), ends)
        spans.append((len(before), end))
    return spans


def _turn_end(
    tokenizer: Tokenizer, chat: Chat, text: str, turn: int, start: int, ends
) -> int:
    if turn == len(chat.messages) - 1:
        return len(text)
    after = render(tokenizer, chat.messages[: turn + 1], chat.template_args)
    if text.startswith(after):
        return len(after)
    # Some templates (Qwen3's) write a turn differently once others follow it.
    found = [(at, end) for end in ends if (at := text.find(end, start)) >= 0]
    if not found:
        _require_prefix(text, after, turn + 1)
    at, end = min(found)
    return at + len(end)


def _require_prefix(text: str, prefix: str, turns: int) -> None:
    if not text.startswith(prefix):
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


def _encode_spans(
    tokenizer: Tokenizer, items: Sequence[tuple[str, Spans]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    results = []
    for first in range(0, len(items), CHUNK):
        chunk = items[first : first + CHUNK]
        encoded = tokenizer(
            [text for text, _ in chunk],
            add_special_tokens=False,  # the template has written them
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for ids, offsets, (_, spans) in zip(
            encoded["input_ids"], encoded["offset_mapping"], chunk, strict=True
        ):
            starts = np.array([start for start, _ in offsets], np.int64)
            mask = np.zeros(len(ids), bool)
            for start, end in spans:
                mask |= (starts >= start) & (starts < end)
            results.append((np.array(ids, np.int32), mask))
    return results
