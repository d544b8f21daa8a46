"""The language of sums, of `--loss` and `--reward`: "A + 0.5*B" -> terms."""

import re
from collections.abc import Callable
from typing import TypeVar

Term = TypeVar("Term")

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
WEIGHT = rf"(?:(?P<weight>[+-]?{NUMBER})\s*\*\s*)?"
"""What a term begins with, to be read by `weight_of`."""


def weight_of(match: re.Match[str]) -> float:
    """The weight that a term begins with; 1 where it has none."""
    return float(match["weight"] or 1.0)


def parse_sum(
    text: str,
    parse_term: Callable[[str, int], tuple[Term, int]],
    plus: re.Pattern[str],
    name: str,
) -> list[Term]:
    """The terms of a sum, in their order.

    Args:
      text: of the sum.
      parse_term: (text, where a term starts) -> the term, and where it ends; raises
        ValueError where there is none.
      plus: what stands between two terms.
      name: what is added up, for messages.

    Raises: ValueError that names what stands behind a term and is no plus.
    """
    term, end = parse_term(text, 0)
    terms = [term]
    while end < len(text):
        between = plus.match(text, end)
        if between is None:
            raise ValueError(
                f"{name} {text!r}: expected + or the end at {text[end:]!r}"
            )
        term, end = parse_term(text, between.end())
        terms.append(term)
    return terms
