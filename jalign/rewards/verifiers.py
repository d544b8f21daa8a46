"""Rewards that check an answer: built in, by name (`--reward gsm8k`).

A number is compared as an exact fraction: 0.5, 1/2 and .50 are one answer.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

_FIELDS = ("answer", "completion", "solution")
_LONGEST = 64  # characters; longer runs of digits are noise, and slow to convert
_DECIMAL = r"(?:(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
# A minus behind a digit, a letter or a bracket subtracts; elsewhere it is a sign.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}.])[-−])?(?:\\?[$€£] ?(?P<inner>[-−])?)?"
    r"(?:(?:(?P<whole>\d+) )?(?<!/)(?P<top>\d+)/(?P<bottom>\d+)(?![\d/])"
    rf"|(?P<decimal>{_DECIMAL}))"
)
_MARKERS = re.compile(r"####|\\boxed\s*\{|the (?:final )?answer is:?", re.IGNORECASE)


def gsm8k(
    prompts: Sequence[Any], completions: Sequence[str], rows: Sequence[Mapping]
) -> list[float]:
    """1 where a completion's final number equals the row's, else 0.

    Args:
      prompts: B, not looked at.
      completions: B texts.
      rows: B data rows whose `answer`, `completion` or `solution` holds the right
        answer: a number, or a text that ends with it behind "####".

    Returns: B numbers, 0.0 or 1.0.
    Raises: ValueError for a row without an answer.
    Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"
      (arXiv:2110.14168), for the "####".
    """
    del prompts
    return [
        float(final_number(text) == _gold(row))
        for text, row in zip(completions, rows, strict=True)
    ]


def gsm8k_format(
    prompts: Sequence[Any], completions: Sequence[str], rows: Sequence[Mapping]
) -> list[float]:
    """1 where a completion ends with "#### NUMBER" and has no other "####", else 0.

    Args:
      prompts, rows: B, not looked at.
      completions: B texts.

    Returns: B numbers, 0.0 or 1.0.
    """
    del prompts, rows
    return [float(_ends_with_answer(text)) for text in completions]


def final_number(text: str) -> Fraction | None:
    """The number that a text ends up with, exactly; None if there is none.

    It is the first one behind the last "####", "\\boxed{" or "the answer is"; in a text
    without these the last one of all. Thousands separators, currency signs, units and
    zeros at the end do not matter; a/b and "1 1/2" are fractions.
    """
    marks = list(_MARKERS.finditer(text))
    if marks:
        return next(_numbers(text[marks[-1].end() :]), None)
    *_, last = [None, *_numbers(text)]
    return last


def _numbers(text: str):
    """Yields the numbers of a text from left to right."""
    for match in _NUMBER.finditer(text):
        if len(match[0]) > _LONGEST:
            continue
        part = match.groupdict()
        if part["top"] is None:
            value = Fraction(re.sub(r"[,{}]", "", part["decimal"]))
        elif not int(part["bottom"]):
            continue
        else:
            value = Fraction(int(part["top"]), int(part["bottom"]))
            value += int(part["whole"] or 0)
        yield -value if part["sign"] or part["inner"] else value


def _gold(row: Mapping) -> Fraction:
    for field in _FIELDS:
        value = row.get(field)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = value[-1].get("content")  # a conversation: its last message
        text = "" if value is None else str(value).strip()
        if _MARKERS.search(text) or _NUMBER.fullmatch(text.rstrip(".%")):
            answer = final_number(text)
            if answer is not None:
                return answer
    raise ValueError(
        f"no right answer in the row's {', '.join(_FIELDS)}; one of them "
        "must be a number, or end with '#### NUMBER'"
    )


def _ends_with_answer(text: str) -> bool:
    body, mark, answer = text.rstrip().rpartition("####")
    return bool(mark) and "####" not in body and bool(_NUMBER.fullmatch(answer.strip()))


VERIFIERS: Mapping[str, Callable[..., list[float]]] = {
    "gsm8k": gsm8k,
    "gsm8k_format": gsm8k_format,
}
"""Name on the command line -> function."""
