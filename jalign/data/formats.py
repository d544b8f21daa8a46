"""Rows of every known layout to the formats of TRL, each row on its own.

Standard rows hold strings, conversational ones lists of {"role", "content"}.
`columns` says which columns are read; docs/data.md has the table. A row is never
mended silently: what does not fit raises `RowError` with the field and the reason.
"""

import math
from itertools import takewhile
from typing import Any, NamedTuple

from jalign.data import columns as layouts
from jalign.data.columns import Layout, is_blank
from jalign.data.messages import (
    Messages,
    Text,
    expect,
    parse_history,
    parse_messages,
    plain_turns,
    require_answer,
    require_content,
    string,
    template_args,
    text_or_turns,
)
from jalign.data.rows import RowError, attempt


class Exchange(NamedTuple):
    """A prompt with what follows; both are strings or both are lists of messages.

    Attributes:
      prompt: None for a `text` or `messages` row, which has no part of its own for it.
      completion: what the model is to produce, or the whole text or conversation.
      template_args: extra variables for the chat template (`tools` among them).
    """

    prompt: Text | None
    completion: Text
    template_args: dict[str, Any]


class Preference(NamedTuple):
    """Two completions of one prompt; `margin` is how much better chosen was judged."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float
    template_args: dict[str, Any]


class Prompt(NamedTuple):
    """A prompt to be completed by sampling."""

    prompt: Text
    template_args: dict[str, Any]


def parse_sft(row: dict) -> Exchange:
    """A conversation, a prompt with its completion, or a text.

    Raises: RowError.
    """
    layout, args = layouts.sft_layout(row), template_args(row)
    prompt, completion = _exchange(row, layout)
    _refuse_args(completion, args)
    return Exchange(prompt, completion, args)


def _exchange(row: dict, layout: Layout) -> tuple[Text | None, Text]:
    if layout.turns:
        turns = _conversation(row, layout)
        require_answer(turns, layout.turns)
        return None, turns
    if layout.text:
        text = string(row[layout.text], layout.text)
        return None, require_content(text, layout.text)
    prompt: Any = _prompt(row, layout)
    (completion,) = _answers(row, layout)
    _same_kind(prompt, completion, layout.answers[0])
    _refuse_repeat(row, layout, prompt, completion)
    if not is_blank(row.get("history")):
        # Its answers are trained, as LLaMA-Factory has it.
        return None, [*prompt, *completion]
    return prompt, completion


def parse_preference(row: dict) -> Preference:
    """`chosen` + `rejected`, with `prompt` or with the prompt at the start of both.

    Raises: RowError; also where a completion is empty or both are equal.
    """
    layout, args = layouts.preference_layout(row), template_args(row)
    prompt, chosen, rejected = _split_preference(row, layout)
    _refuse_equal(layout, chosen, rejected)
    _refuse_args(chosen, args)
    return Preference(prompt, chosen, rejected, _margin(row), args)


def _split_preference(row: dict, layout: Layout) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected apart, whichever way the row holds the prompt."""
    chosen, rejected = _answers(row, layout)
    _same_kind(chosen, rejected, layout.answers[1])
    if not layout.prompt:
        _refuse_equal(layout, chosen, rejected)
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        return _with_system(prompt, row, layout), chosen, rejected
    name, *_ = layout.prompt
    if isinstance(row[name], list) or isinstance(chosen, str):
        prompt = _prompt(row, layout)
        _same_kind(prompt, chosen, layout.answers[0])
        _refuse_repeat(row, layout, prompt, chosen)
        return prompt, chosen, rejected
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        _refuse_repeat(row, layout, [], chosen)
        return _prompt_turns(row, layout), chosen, rejected
    # As in UltraFeedback: the string repeats a turn of the conversations.
    turns: Any
    turns, chosen, rejected = extract_prompt(chosen, rejected)
    text = _asked_text(row, layout).strip()
    if not any(turn["content"].strip() == text for turn in turns):
        raise RowError(name, "is no turn of the conversations")
    return _with_system(turns, row, layout), chosen, rejected


def _refuse_equal(layout: Layout, chosen: Text, rejected: Text) -> None:
    first, second = layout.answers
    if chosen == rejected:
        raise RowError(second, f"equals {first}")


def _refuse_repeat(row: dict, layout: Layout, prompt: Text, answer: Text) -> None:
    """Refuses answers that begin with the prompt once more."""
    name = layout.answers[0]
    if isinstance(prompt, list) and prompt and answer[: len(prompt)] == prompt:
        reason = f"repeats the turns of {layout.prompt[0]}; leave one of them out"
        raise RowError(name, reason)
    texts = [row[name] for name in (layout.prompt[0], *layout.answers)]
    if all(isinstance(text, str) for text in texts):
        asked, *rest = map(str.strip, texts)
        # One answer may well echo a word: "Hello" is answered by "Hello! ...".
        alone = len(rest) == 1 and len(asked.split()) < 2
        if not alone and all(_continues(asked, text) for text in rest):
            reason = f"begins with {layout.prompt[0]} once more; leave one of them out"
            raise RowError(name, reason)


def _continues(start: str, text: str) -> bool:
    """Whether a text is the start and more words."""
    if not start or not text.startswith(start) or len(text) == len(start):
        return False
    return not (start[-1].isalnum() and text[len(start)].isalnum())


def parse_prompt(row: dict) -> Prompt:
    """The prompt of any row, also of one with answers, which are left out: what
    `parse_preference` puts before two answers, and `parse_sft` before one.

    Of a conversation the trailing assistant turns are left out.
    Raises: RowError.
    """
    layout, args = layouts.prompt_layout(row), template_args(row)
    prompt = plain_turns(_asked(row, layout))
    _refuse_args(prompt, args)
    return Prompt(prompt, args)


def _asked(row: dict, layout: Layout) -> Text:
    if layout.answers:
        return _split_preference(row, layout)[0]
    if not layout.turns:
        return _prompt(row, layout)
    turns = _conversation(row, layout)
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise RowError(layout.turns, "has no turn before the assistant's")
    return turns


def _conversation(row: dict, layout: Layout) -> Messages:
    """The row's conversation, behind the system's turn."""
    name = layout.turns or ""
    turns = parse_messages(row[name], name)
    for other in layouts.TURNS:
        value = None if other == name else row.get(other)
        if not is_blank(value) and attempt(parse_messages, value, other) != turns:
            raise RowError(
                other,
                f"says another thing than {name}, which goes before it: leave one out "
                f"by --columns ignore={other} or ignore={name}",
            )
    return _with_system(turns, row, layout)


def _prompt(row: dict, layout: Layout) -> Text:
    """The prompt: as it stands, or as turns with the system's and the history."""
    name = layout.prompt[0]
    if isinstance(row[name], list):
        return _with_system(parse_messages(row[name], name), row, layout)
    return _prompt_turns(row, layout) if layout.is_chat else string(row[name], name)


def _prompt_turns(row: dict, layout: Layout) -> Messages:
    """A prompt of strings as turns: the system's, the history, the user's."""
    text, system = _asked_text(row, layout), _system(row, layout)
    text = require_content(text, layout.prompt[0])
    start = [{"role": "system", "content": system}] if system else []
    if not is_blank(row.get("history")):
        start += parse_history(row["history"])
    return [*start, {"role": "user", "content": text}]


def _asked_text(row: dict, layout: Layout) -> str:
    """What the user says: the prompt's columns, below each other."""
    texts = [string(row[name], name) for name in layout.prompt]
    return "\n\n".join(text for text in texts if text.strip())


def _answers(row: dict, layout: Layout) -> list[Any]:
    """The answers; as turns where the prompt is a conversation."""
    names = layout.answers
    answers = [require_content(text_or_turns(row.get(x), x), x) for x in names]
    prompt = row[layout.prompt[0]] if layout.prompt else None
    if prompt is not None and (layout.is_chat or isinstance(prompt, list)):
        for i, answer in enumerate(answers):
            if isinstance(answer, str):
                answers[i] = [{"role": "assistant", "content": answer}]
    return answers


def _with_system(turns: Any, row: dict, layout: Layout) -> Any:
    """A conversation behind the system's turn, of which there is one."""
    if not is_blank(row.get("history")):
        raise RowError("history", "stands beside a conversation: put its turns there")
    text, name = _system(row, layout), layout.system or ""
    if text and isinstance(turns, str):
        raise RowError(name, "needs a prompt column, or conversations")
    if not text:
        return turns
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": text}, *turns]
    if turns[0]["content"].strip() != text.strip():
        raise RowError(name, "says another thing than the system's turn")
    return turns


def _system(row: dict, layout: Layout) -> str:
    name = layout.system
    return "" if name is None or is_blank(row[name]) else string(row[name], name)


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits the common start of two completions off as their prompt.

    Conversations are split between turns. Strings are split before a white space, so
    that no word is cut, and so that neither completion is empty; what the completions
    still share adds equally to both and cancels in every preference loss.
    """
    pairs = zip(chosen, rejected, strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        spaces = (i for i in range(common) if chosen[i].isspace())
        fit = (i for i in spaces if chosen[i:].strip() and rejected[i:].strip())
        common = max(fit, default=0)
    else:
        common = min(common, len(chosen) - 1, len(rejected) - 1)
    if common == 0:
        raise RowError("prompt", "missing, and chosen and rejected share no beginning")
    require_content(chosen[common:], "chosen")
    require_content(rejected[common:], "rejected")
    return chosen[:common], chosen[common:], rejected[common:]


def _refuse_args(text: Text, args: dict[str, Any]) -> None:
    """Refuses variables for the chat template beside strings, which have none."""
    if args and isinstance(text, str):
        name = "tools" if "tools" in args else "chat_template_kwargs"
        raise RowError(
            name,
            "is for the chat template, which text does not go through: make messages "
            f"of the text, or leave the column out by --columns ignore={name}",
        )


def _same_kind(first: Text, second: Text, field: str) -> None:
    if isinstance(first, str) != isinstance(second, str):
        raise RowError(field, "mixes strings and lists of messages in one row")


def _margin(row: dict) -> float:
    value = row.get("margin")
    if value is None:
        return 0.0
    if not math.isfinite(expect(value, int | float, "margin", "a number")):
        raise RowError("margin", "is not finite")
    return float(value)
