"""Which token starts, ends and pads a text: settled in one place, for all rooms.

A model's files name their special tokens several times (tokenizer, config.json,
generation_config.json), and the chat template ends a turn with one that none of them
need mention. What is settled here is what sampling stops at, what a reward is read
at, and what is exported.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from jalign.data.messages import Messages
from jalign.data.rows import RowError
from jalign.data.templates import Uncompiled, rendering

logger = logging.getLogger("jalign.data")

Tokenizer = Any  # transformers.PreTrainedTokenizerFast

_PAD_NAMES = ["<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"]
_PAD_NAMES += ["<|reserved_special_token_0|>", "<|endoftext|>"]
GENERATION_TAG = re.compile(r"\{%(-?)(\s*)generation\s*(-?)%\}")
_END_TAG = re.compile(r"\{%(-?)(\s*)endgeneration\s*(-?)%\}")
_QUESTION: Messages = [{"role": "user", "content": "q"}]
_ANSWER = "jalign"  # plain letters: no template trims or escapes them


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


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts before a raw text: [bos] or []."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def ensure_chat_template(tokenizer: Tokenizer) -> None:
    """Sets the default template on a tokenizer without one, so that it is exported."""
    if tokenizer.chat_template:
        return
    bos = "{{ bos_token }}" if leading_ids(tokenizer) else ""
    tokenizer.chat_template = bos + DEFAULT_CHAT_TEMPLATE
    logger.warning("the tokenizer has no chat template; using jalign's plain one")


def split_turn(tokenizer: Tokenizer) -> tuple[str, str]:
    """A rendered question with its answer, split behind the answer's own text.

    The second part is what the chat template writes behind a last assistant turn, for
    example "<|im_end|>\\n"; both are "" without a template, or where it refuses a plain
    question and answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    turns = [*_QUESTION, {"role": "assistant", "content": _ANSWER}]
    try:
        with rendering(tokenizer):
            text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (RowError, Uncompiled) as error:
        logger.debug("the chat template refuses a question and answer: %s", error)
        return "", ""
    head, answer, tail = text.rpartition(_ANSWER)
    return (head + answer, tail) if answer else ("", "")


def turn_end(tokenizer: Tokenizer) -> str | None:
    """The special token that ends an assistant's turn in the chat template, if any."""
    tail = split_turn(tokenizer)[1].lstrip()
    if not tail:
        return None
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    ends = [token for token in added if token and tail.startswith(token)]
    return max(ends, key=len, default=None)


def end_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens, as text, that end an answer: the tokenizer's EOS, the template's."""
    ends = (tokenizer.eos_token, turn_end(tokenizer))
    return tuple(dict.fromkeys(end for end in ends if end))


def stop_tokens(tokenizer: Tokenizer, eos_token_ids: Sequence[int] = ()) -> list[int]:
    """Every token that ends a completion.

    Args:
      tokenizer: its EOS, and what its chat template ends a turn with.
      eos_token_ids: those that the model's files name; they come first.

    Returns: different ids.
    """
    end = turn_end(tokenizer)
    known = [*eos_token_ids, tokenizer.eos_token_id]
    known.append(None if end is None else tokenizer.convert_tokens_to_ids(end))
    return list(dict.fromkeys(token for token in known if token is not None))


def settle_pad_token(tokenizer: Tokenizer) -> None:
    """Gives the tokenizer a pad token that ends no answer.

    A pad token that also ends answers hides the end from whoever masks by it:
    transformers reads a reward model at the last token that is not padding. No token is
    ever added, so where no token is meant for it, another one serves.
    """
    pad, ends = tokenizer.pad_token, end_texts(tokenizer)
    if pad is not None and pad not in ends:
        return
    vocab = tokenizer.get_vocab()
    names = [*_PAD_NAMES, tokenizer.unk_token, *tokenizer.all_special_tokens]
    names += sorted(vocab, key=vocab.__getitem__, reverse=True)
    tokenizer.pad_token = next(
        (name for name in names if name in vocab and name not in ends), ends[0]
    )
    using = tokenizer.pad_token, tokenizer.pad_token_id
    logger.info("the tokenizer's pad token was %r; using %r (id %d)", pad, *using)


def end_template_at_turn(tokenizer: Tokenizer) -> None:
    """Makes the chat template write nothing behind the end of the last turn.

    A reward model reads its score at the last token of a text. Many templates write a
    line break behind the end of a turn, which no policy ever samples; a template that
    ends where sampling ends has the score read at one token everywhere.
    """
    _, tail = split_turn(tokenizer)
    if tail == tail.rstrip():
        return

    def ended(template: str) -> str:
        # Jinja drops one line break at the end of a template, but not in a block; and
        # transformers cannot find marked tokens in a block.
        body = GENERATION_TAG.sub(r"{%\1 if true \3%}", template.removesuffix("\n"))
        body = _END_TAG.sub(r"{%\1 endif \3%}", body)
        return (
            "{% set _conversation %}" + body + "{% endset %}{{ _conversation if "
            "add_generation_prompt is defined and add_generation_prompt else "
            "_conversation.rstrip() }}"
        )

    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = {name: ended(text) for name, text in template.items()}
    else:
        template = ended(template)
    tokenizer.chat_template = template
