"""Parsed rows to token ids and masks, whole: nothing is cut here."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jalign.data import chat as chat_lib
from jalign.data.formats import Exchange, Prompt
from jalign.data.messages import plain_turns
from jalign.data.rows import RowError
from jalign.data.special_tokens import end_texts
from jalign.data.tokenizer import Tokenizer, encode_pairs, encode_plain, encode_texts
from jalign.data.written import Seen, check_written


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

    Returns: in order, the example or what is wrong with the row.
    """
    results: list[Any] = [None] * len(exchanges)
    strings = [i for i, e in enumerate(exchanges) if isinstance(e.completion, str)]
    pairs: Any = [(exchanges[i].prompt or "", exchanges[i].completion) for i in strings]
    for i, (ids, start) in zip(strings, encode_pairs(tokenizer, pairs), strict=True):
        whole: Any = exchanges[i].completion if exchanges[i].prompt is None else None
        everything = whole is not None or completion_only is False
        wrong = None if eos_inside else _eos_error(tokenizer, ids, start, whole)
        mask = np.arange(len(ids)) >= (0 if everything else start)
        results[i] = wrong or _example(ids, mask, keep_tail)
    jobs: dict[bool, list[tuple[int, chat_lib.Chat]]] = {True: [], False: []}
    ends = () if eos_inside else end_texts(tokenizer)
    for i, exchange in enumerate(exchanges):
        if results[i] is None:
            only, chat = _chat(exchange, assistant_only, completion_only)
            results[i] = _eos_in_turns(chat, ends)
            if results[i] is None:
                jobs[only].append((i, chat))
    for only, job in jobs.items():
        chats = [chat for _, chat in job]
        encoded = chat_lib.encode_chats(tokenizer, chats, assistant_only=only)
        for (i, _), item in zip(job, encoded, strict=True):
            bad = isinstance(item, RowError)
            results[i] = item if bad else _example(*item, keep_tail)
    return results


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


def _eos_in_turns(chat: chat_lib.Chat, ends: Sequence[str]) -> RowError | None:
    """What is wrong with an answer that holds what the template ends a turn with."""
    for turn in chat.messages[chat.first_turn :]:
        held = [end for end in ends if end in turn["content"]]
        if turn["role"] == "assistant" and held:
            return RowError(
                "(answer)",
                f"holds the EOS {held[0]!r}, which the template writes behind it: "
                "leave it out of the text",
            )
    return None


def _chat(
    exchange: Exchange, assistant_only: bool | None, completion_only: bool | None
) -> tuple[bool, chat_lib.Chat]:
    """The conversation, and whether only the assistant's turns are trained."""
    prompt: Any = exchange.prompt or []
    completion: Any = exchange.completion
    messages, first = chat_lib.join_turns(prompt, completion)
    marks = [turn.get("train", True) for turn in messages]
    messages, prompt = plain_turns(messages), plain_turns(prompt)
    if prompt and completion_only is False:
        prompt, first, only = [], 0, bool(assistant_only)
    else:
        only = assistant_only is not False
    args = exchange.template_args
    untrained = [i for i in range(first, len(messages)) if not marks[i]]
    return only, chat_lib.Chat(messages, prompt, first, args, untrained)


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
    tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[tuple[str, np.ndarray] | RowError]:
    """Encodes prompts to (text as the model sees it, ids), or to what is wrong."""
    seen: Seen = {}
    texts = [_prompt_text(prompt, tokenizer, seen) for prompt in prompts]
    results: list[Any] = list(texts)
    for encode, kind in ((encode_texts, str), (encode_plain, list)):
        chosen = [
            i
            for i, text in enumerate(texts)
            if isinstance(text, str) and isinstance(prompts[i].prompt, kind)
        ]
        encoded = encode(tokenizer, [str(texts[i]) for i in chosen])
        for i, ids in zip(chosen, encoded, strict=True):
            empty = RowError("prompt", "empty, and the tokenizer puts no BOS before it")
            results[i] = (texts[i], ids) if len(ids) else empty
    return results


def _prompt_text(prompt: Prompt, tokenizer: Tokenizer, seen: Seen) -> str | RowError:
    turns, args = prompt
    if isinstance(turns, str):
        return turns
    chat_lib.ensure_chat_template(tokenizer)
    try:
        check_written(partial(chat_lib.render, tokenizer), turns, args, seen)
        return chat_lib.render_prompt(tokenizer, turns, args)
    except RowError as error:
        return error
