"""The language of `--loss`: "dpo:beta=0.1 + 0.2*sft" -> terms with their functions."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jalign.settings import check_bounds, nearest
from jalign.terms import NUMBER, WEIGHT, parse_sum, weight_of
from jalign.train.loss_table import BOUNDS, Entry

_PLUS = re.compile(r"\+")
_VALUE = r"(?:[^,+\s]|(?<=[eE])\+)+"  # a plus ends it, but not the one in 1e+3
_TERM = re.compile(
    rf"\s*{WEIGHT}(?P<name>[A-Za-z_]\w*)"
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

    Raises: ValueError that names the part it cannot use, or the option that is out of
      its bounds.
    """
    given = {k: v for k, v in (flags or {}).items() if v is not None}

    def parse_term(text: str, start: int) -> tuple[Term, int]:
        match = _TERM.match(text, start)
        if match is None:
            raise ValueError(
                f"loss {text!r}: expected [WEIGHT*]NAME[:OPTION=NUMBER,...] at "
                f"{text[start:]!r}, as in 'dpo:beta=0.1 + 0.2*sft'"
            )
        return _term(match, table, given), match.end()

    terms: dict[str, Term] = {}
    for term in parse_sum(text, parse_term, _PLUS, "loss"):
        if term.name in terms:
            raise ValueError(f"loss {text!r}: {term.name!r} occurs twice; add them up")
        terms[term.name] = term
    known = [option_names(term.entry.function) for term in terms.values()]
    for flag in given:
        if not any(flag in names for names in known):
            raise ValueError(f"{flag} is set, but no loss of {text!r} has it: drop it")
    return terms


def _term(match: re.Match, table: Mapping[str, Entry], given) -> Term:
    name = match["name"]
    if name not in table:
        known = ", ".join(sorted(table))
        raise ValueError(f"loss {name!r} is not one of {known}{nearest(name, table)}")
    entry = table[name]
    known = option_names(entry.function) - set(entry.keywords)
    options = {k: v for k, v in given.items() if k in known}
    for pair in filter(None, (match["options"] or "").split(",")):
        key, value = pair.split("=")
        if key not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(f"loss {name!r} has no option {key!r}; it has: {names}")
        if not re.fullmatch(f"[+-]?{NUMBER}", value):
            raise ValueError(f"loss option {name}:{key}={value!r} is not a number")
        options[key] = float(value)
    parameters = inspect.signature(entry.function).parameters
    for key in sorted(known - options.keys() - entry.defaults.keys()):
        if parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"loss {name!r} needs {key}: {name}:{key}=NUMBER")
    term = Term(weight_of(match), name, entry, options)
    for key, value in term.settings.items():
        bounds = entry.bounds.get(key, BOUNDS.get(key, ()))
        check_bounds(key, value, bounds, f" (loss {name!r})")
    return term


def option_names(function: Callable[..., Any]) -> set[str]:
    """The keyword-only parameters of a loss: its scalars."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
