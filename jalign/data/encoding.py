"""Parsed rows to token ids and masks, whole: nothing is cut here."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jalign.data.chat import Chat, Seen, check_written, encode_chats, join_turns
from jalign.data.formats import Exchange, Prompt
from jalign.data.messages import plain_turns
from jalign.data.rows import RowError, Share, alone, attempt, encode_some
from jalign.data.special_tokens import end_texts, ensure_chat_template, leading_ids
from jalign.data.templates import render_prompt
from jalign.data.tokenizer import (
    Tokenizer,
    encode_pairs,
    encode_plain,
    with_bos,
)


class Example(NamedTuple):
    """One document.

    Attributes:
      tokens: int32 [T].
      completion_mask: bool [T], True where the token is trained; False at 0.
    """

    tokens: np.ndarray
    completion_mask: np.ndarray


def encode_exchanges(
    exchanges: Sequence[Exchange],
    tokenizer: Tokenizer,
    assistant_only: bool | None = None,
    completion_only: bool | None = None,
    *,
    eos_inside: bool = False,
    keep_tail: bool = False,
    share: Share = alone,
) -> list[Example | RowError]:
    """Encodes strings and conversations, each kind in one call of the tokenizer.

    Args:
      exchanges: parsed rows.
      tokenizer: with an EOS token.
      assistant_only, completion_only: as in `sft_examples`.
      keep_tail: keep what the chat template writes behind the last trained token.
        Nothing learns from it, but a reward model of others may be read there.
      eos_inside: allow an EOS before the end of an answer, for one that is rejected;
        any other would train to go on behind it.
      share: of the templating and tokenizing.

    Returns: in order, the example or what is wrong with the row.
    """
    ends = () if eos_inside else end_texts(tokenizer)

    def encode_strings(chosen: list[Exchange]) -> Iterator[Example | RowError]:
        pairs: Any = [(e.prompt or "", e.completion) for e in chosen]
        encoded = encode_pairs(tokenizer, pairs, share)
        for (prompt, text, _args), (ids, start) in zip(chosen, encoded, strict=True):
            whole: Any = text if prompt is None else None
            everything = whole is not None or completion_only is False
            wrong = None if eos_inside else _eos_error(tokenizer, ids, start, whole)
            mask = np.arange(len(ids)) >= (0 if everything else start)
            yield wrong or _example(ids, mask, keep_tail)

    def encode_turns(chosen: list[Exchange]) -> Iterator[Example | RowError]:
        chats = [
            attempt(_chat, exchange, assistant_only, completion_only, ends)
            for exchange in chosen
        ]
        encode = partial(encode_chats, tokenizer, share=share)
        for item in encode_some(chats, encode):
            bad = isinstance(item, RowError)
            yield item if bad else _example(*item, keep_tail=keep_tail)

    found = encode_some(exchanges, encode_strings, _is_strings)
    return encode_some(found, encode_turns, lambda item: isinstance(item, Exchange))


def _is_strings(exchange: Exchange) -> bool:
    return isinstance(exchange.completion, str)


def _eos_error(
    tokenizer: Tokenizer, ids: np.ndarray, start: int, text: str | None
) -> RowError | None:
    """What is wrong with the EOS tokens of an answer, or of a `text` row's text.

    A text may hold more of them than the one that ends it, as a templated conversation
    does, if it ends in one of its own.
    """
    ends = ids == tokenizer.eos_token_id
    ends[:1] = False  # it may be the BOS as well
    if not ends[start:-1].any():
        return None
    name = tokenizer.eos_token
    if text is None:
        reason = f"holds the EOS {name!r} before its end: nothing is sampled behind it"
        return RowError("completion", reason)
    if text.endswith(name) and not ends[-2:].all():
        return None
    reason = f"holds the EOS {name!r} and would get another: let it end with just one"
    return RowError("text", reason + ", nothing behind it, or use `messages`")


def _chat(
    exchange: Exchange,
    assistant_only: bool | None,
    completion_only: bool | None,
    ends: Sequence[str],
) -> Chat:
    """The conversation. Raises RowError for an answer that holds one of the ends."""
    prompt: Any = exchange.prompt or []
    completion: Any = exchange.completion
    turns, first = join_turns(prompt, completion)
    only = assistant_only is not False
    if prompt and completion_only is False:
        prompt, first, only = [], 0, bool(assistant_only)
    for turn in turns[first:]:
        held = [end for end in ends if end in turn["content"]]
        if turn["role"] == "assistant" and held:
            raise RowError(
                "(answer)",
                f"holds the EOS {held[0]!r}, which the template writes behind it: "
                "leave it out of the text",
            )
    marks = [turn.get("train", True) for turn in turns]
    untrained = [i for i in range(first, len(turns)) if not marks[i]]
    turns, prompt = plain_turns(turns), plain_turns(prompt)
    return Chat(turns, prompt, first, exchange.template_args, untrained, only)


def _example(ids: np.ndarray, mask: np.ndarray, keep_tail: bool) -> Example | RowError:
    mask = np.array(mask, bool)
    mask[:1] = False  # nothing predicts the first token
    if not mask.any():
        return RowError("(row)", "no token of it would be trained")
    end = len(ids) if keep_tail else int(np.flatnonzero(mask)[-1]) + 1
    return Example(ids[:end], mask[:end])


def check_masks_apply(
    exchanges: Sequence[Exchange],
    assistant_only: bool | None,
    completion_only: bool | None,
) -> None:
    """Raises ValueError where a mask was asked for that some row cannot have."""
    if assistant_only and any(isinstance(e.completion, str) for e in exchanges):
        raise ValueError("assistant_only=True needs conversations; some rows are text")
    if completion_only and any(e.prompt is None for e in exchanges):
        raise ValueError(
            "completion_only=True needs prompt + completion; some rows have no prompt"
        )


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], share: Share = alone
) -> list[tuple[str, np.ndarray] | RowError]:
    """Encodes prompts to (text as the model sees it, ids), or to what is wrong."""
    seen: Seen = {}
    bos = leading_ids(tokenizer)

    def checked(prompt: Prompt) -> Prompt:
        turns, args = prompt
        if not isinstance(turns, str):
            ensure_chat_template(tokenizer)
            check_written(tokenizer, turns, args, seen)
        return prompt

    def text_of(prompt: Prompt) -> tuple[str, bool]:
        turns, args = prompt
        if isinstance(turns, str):
            return turns, True
        return render_prompt(tokenizer, turns, args), False

    def encode_texts(found: list[tuple[str, bool]]):
        encoded = encode_plain(tokenizer, [text for text, _ in found])
        for (text, is_raw), ids in zip(found, encoded, strict=True):
            ids = with_bos(bos, ids) if is_raw else ids
            empty = RowError("prompt", "empty, and the tokenizer puts no BOS before it")
            yield (text, ids) if len(ids) else empty

    def encode(found: list[Prompt]):
        return encode_some([attempt(text_of, prompt) for prompt in found], encode_texts)

    good = [attempt(checked, prompt) for prompt in prompts]
    return encode_some(good, partial(share, encode))
