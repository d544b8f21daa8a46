"""The language of `--loss`: "dpo:beta=0.1 + 0.2*sft" -> terms with their functions."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import jax

from jalign.train.loss_table import Entry

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_VALUE = r"(?:[^,+\s]|(?<=[eE])\+)+"  # a plus ends it, but not the one in 1e+3
_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z_]\w*)"
    rf"(?::(?P<options>\w+={_VALUE}(?:,\w+={_VALUE})*))?\s*"
)


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a loss.

    Attributes:
      weight: its factor.
      name: as the user wrote it.
      entry: of the registry.
      options: keyword arguments of the entry's function.
    """

    weight: float
    name: str
    entry: Entry
    options: dict[str, float]

    def __call__(self, inputs: Mapping[str, jax.Array]) -> jax.Array:
        """The weighted, unreduced loss of the named arrays."""
        arrays = [inputs[name] for name in self.entry.inputs]
        keywords = {name: inputs[name] for name in self.entry.keywords}
        options: dict[str, Any] = self.settings | keywords
        return self.weight * self.entry.function(*arrays, **options)

    @property
    def settings(self) -> dict[str, float]:
        """The function's scalars: the entry's defaults under the options."""
        return dict(self.entry.defaults) | self.options


def parse_losses(
    text: str,
    table: Mapping[str, Entry],
    flags: Mapping[str, float | None] | None = None,
) -> dict[str, Term]:
    """The terms of a loss, [WEIGHT*]NAME[:OPTION=NUMBER,...] with + between them.

    Args:
      text: for example "dpo:beta=0.1 + 0.2*sft".
      table: name -> Entry, of `train.loss_table`.
      flags: options for every term that has them and does not give its own; None is
        an option that was not given.

    Returns: name -> term, in their order.

    Raises: ValueError that names the part it cannot use.
    """
    given = {k: v for k, v in (flags or {}).items() if v is not None}
    terms: dict[str, Term] = {}
    position = 0
    while True:
        match = _TERM.match(text, position)
        if match is None:
            raise ValueError(
                f"loss {text!r}: expected [WEIGHT*]NAME[:OPTION=NUMBER,...] at "
                f"{text[position:]!r}, as in 'dpo:beta=0.1 + 0.2*sft'"
            )
        term = _term(match, table, given)
        if term.name in terms:
            raise ValueError(f"loss {text!r}: {term.name!r} occurs twice; add them up")
        terms[term.name] = term
        position = match.end()
        if position == len(text):
            break
        if text[position] != "+":
            raise ValueError(
                f"loss {text!r}: expected + or the end at {text[position:]!r}"
            )
        position += 1
    for flag in given:
        if not any(
            flag in option_names(term.entry.function) for term in terms.values()
        ):
            raise ValueError(f"{flag} is set, but no loss of {text!r} has it: drop it")
    return terms


def _term(match: re.Match, table: Mapping[str, Entry], given) -> Term:
    name = match["name"]
    if name not in table:
        known = ", ".join(sorted(table))
        close = get_close_matches(name, table, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"loss {name!r} is not one of {known}{hint}")
    entry = table[name]
    known = option_names(entry.function) - set(entry.keywords)
    options = {k: v for k, v in given.items() if k in known}
    for pair in filter(None, (match["options"] or "").split(",")):
        key, value = pair.split("=")
        if key not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(f"loss {name!r} has no option {key!r}; it has: {names}")
        options[key] = _number(f"{name}:{key}", value)
    missing = _required(entry.function) - options.keys() - entry.defaults.keys()
    if missing := sorted(missing - set(entry.keywords)):
        raise ValueError(
            f"loss {name!r} needs {missing[0]}: {name}:{missing[0]}=NUMBER"
        )
    return Term(float(match["weight"] or 1.0), name, entry, options)


def _number(where: str, value: str) -> float:
    if not re.fullmatch(_NUMBER, value):
        raise ValueError(f"loss option {where}={value!r} is not a number")
    return float(value)


def option_names(function: Callable[..., Any]) -> set[str]:
    """The keyword-only parameters of a loss: its scalars."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def _required(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters
    return {
        n
        for n in option_names(function)
        if parameters[n].default is inspect.Parameter.empty
    }
