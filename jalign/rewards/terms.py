"""The language of `--reward`: "gsm8k + 0.5*min(runs/a/model, runs/b/model)" -> terms.

    reward   = term { " + " term }
    term     = [NUMBER "*"] (SOURCE | ensemble | "(" ensemble ")")
    ensemble = "min(" SOURCE { "," SOURCE } ")"
             | "mean(" SOURCE { "," SOURCE } ")" [" - " [NUMBER "*"] ("std" | "var")]

Ensembles of reward models are Coste et al.'s (2023, arXiv:2310.02743) against
over-optimization: the mean, the worst case `min`, and the uncertainty-weighted mean,
which is `mean(...) - C*var` in the paper; `std` has the unit of the reward.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from jalign.terms import NUMBER, WEIGHT, parse_sum, weight_of

Source = str | Callable[..., Any]
Rewards = Source | Sequence[Any]
"""What `reward` may be: the text of a sum, a function, or a list of those, each one
also with its weight, as in ["gsm8k", (0.5, polite)]."""

_TERM = re.compile(rf"{WEIGHT}(?P<source>\S(?:.*\S)?)", re.S)
_ENSEMBLE = re.compile(rf"\s*{WEIGHT}(?P<open>\(\s*)?(?P<how>mean|min)\s*\(")
_PENALTY = re.compile(rf"\s*-\s*(?:(?P<factor>{NUMBER})\s*\*\s*)?(?P<of>std|var)\s*")
_PLUS = re.compile(r"\s\+(?=\s)")  # one blank may stand between two of them


class Ensemble(NamedTuple):
    """Several rewards as one.

    Attributes:
      how: "mean" or "min", over the members.
      members: terms of weight 1, each with a source.
      penalty: what is subtracted from a mean is so many times
      spread: "std" or "var" over the members, the population's; "" for none.
    """

    how: str
    members: tuple["RewardTerm", ...]
    penalty: float = 0.0
    spread: str = ""

    def __str__(self) -> str:
        text = f"{self.how}({', '.join(member.name for member in self.members)})"
        return f"{text} - {self.penalty:g}*{self.spread}" if self.spread else text


class RewardTerm(NamedTuple):
    """One summand of a reward.

    Attributes:
      weight: its factor.
      name: in the metrics, `rewards/NAME/mean`.
      source: a built-in verifier, FILE.py:FUNCTION, a reward checkpoint, or a function;
        of an ensemble its text.
      ensemble: None for a single source.
    """

    weight: float
    name: str
    source: Source
    ensemble: Ensemble | None = None


def parse_rewards(reward: Rewards) -> tuple[RewardTerm, ...]:
    """The terms of a reward: [WEIGHT*]SOURCE, with " + " between them.

    The plus stands between spaces, since a path may hold one. A member of an ensemble
    may hold spaces, and parentheses that are closed again, but no comma.

    Args:
      reward: for example "gsm8k + 0.5*style.py:polite", or "mean(A, B, C) - 0.5*std";
        or a function; or a list of these and of (weight, one of these).

    Returns: the terms in their order. Each name is the last part of its path, or as
      many parts as tell it from the others, as in "a/model" and "b/model".
    Raises: ValueError that names the part it cannot use.
    """
    parts = list(reward) if isinstance(reward, list | tuple) else [reward]
    if isinstance(reward, tuple) and len(parts) == 2 and _is_number(parts[0]):
        parts = [reward]  # one term with its weight
    terms = [term for part in parts for term in _terms_of(part)]
    if not terms:
        raise ValueError("reward: the list is empty")
    return _named(terms)


def single_sources(terms: Iterable[RewardTerm]) -> list[RewardTerm]:
    """The terms with each ensemble's members in its place."""
    return [
        leaf for t in terms for leaf in (t.ensemble.members if t.ensemble else (t,))
    ]


def is_function(source: Source) -> bool:
    """Whether a source is a function, or names `file.py:function`, and is no model."""
    return not isinstance(source, str) or source.rpartition(":")[0].endswith(".py")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _terms_of(part: Any) -> Iterator[RewardTerm]:
    """The terms of one part of a list, not named yet."""
    if isinstance(part, str):
        yield from parse_sum(f" {part} ", partial(_parse, whole=part), _PLUS, "reward")
    elif callable(part):
        yield RewardTerm(1.0, "", part)
    elif isinstance(part, tuple) and len(part) == 2 and _is_number(part[0]):
        for term in _terms_of(part[1]):
            yield term._replace(weight=float(part[0]) * term.weight)
    else:
        raise ValueError(
            f"reward {part!r} is a {type(part).__name__}: expected the text of a "
            "--reward, a function, or (weight, one of these)"
        )


def _parse(text: str, start: int, *, whole: str) -> tuple[RewardTerm, int]:
    """The summand that starts there, not named yet, and where it ends."""
    head = _ENSEMBLE.match(text, start)
    plus = _PLUS.search(text, _closed(text, head.end(), whole) if head else start)
    end = plus.start() if plus else len(text)
    part = text[start:end].strip()
    if head := _ENSEMBLE.match(part):
        return _parse_ensemble(part, head), end
    match = _TERM.fullmatch(part)
    if match is None:
        raise ValueError(
            f"reward {whole!r}: expected [WEIGHT*]SOURCE between the plus signs, as "
            "in 'gsm8k + 0.5*style.py:polite'"
        )
    return RewardTerm(weight_of(match), "", match["source"]), end


def _closed(text: str, start: int, whole: str) -> int:
    """Where the parenthesis that stands open at `start` is closed."""
    for at, depth in _depths(text, start):
        if not depth:
            return at
    raise ValueError(f"reward {whole!r}: a parenthesis is not closed")


def _depths(text: str, start: int) -> Iterator[tuple[int, int]]:
    """Each place, and how many parentheses are open behind it: 1 at the start."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        yield at, depth


def _parse_ensemble(part: str, head: re.Match[str]) -> RewardTerm:
    end, where = _closed(part, head.end(), part), f"reward {part!r}:"
    depths = _depths(part, head.end())
    commas = [at for at, depth in depths if depth == 1 and part[at] == ","]
    borders = [head.end() - 1, *(at for at in commas if at < end), end]
    sources = [part[a + 1 : b].strip() for a, b in itertools.pairwise(borders)]
    for source in sources:
        weighted = re.match(rf"{NUMBER}\s*\*", source)
        if not source or weighted or _ENSEMBLE.match(source):
            raise ValueError(
                f"{where} {source!r} is no member of an ensemble: a checkpoint, "
                "FILE.py:FUNCTION or a built-in check, without a weight"
            )
    if len(set(sources)) < max(2, len(sources)):
        raise ValueError(
            f"{where} an ensemble needs two members or more, all different"
        )
    tail = part[end + 1 :]
    if head["open"]:
        if not tail.rstrip().endswith(")"):
            raise ValueError(f"{where} a parenthesis is not closed")
        tail = tail.rstrip()[:-1]
    penalty = _PENALTY.fullmatch(tail) if head["how"] == "mean" else None
    if tail.strip() and not penalty:
        more = " - C*std, - C*var or" if head["how"] == "mean" else ""
        rest = tail.strip()
        raise ValueError(
            f"{where} behind {head['how']}(...) comes{more} nothing, not {rest!r}"
        )
    if penalty and head["weight"] and not head["open"]:
        raise ValueError(f"{where} say what is weighted: W*(mean(...) - C*std)")
    members = tuple(RewardTerm(1.0, "", source) for source in sources)
    less = (float(penalty["factor"] or 1.0), penalty["of"]) if penalty else (0.0, "")
    ensemble = Ensemble(head["how"], members, *less)
    return RewardTerm(weight_of(head), "", part, ensemble)


def _named(terms: Sequence[RewardTerm]) -> tuple[RewardTerm, ...]:
    leaves = single_sources(terms)
    texts = [leaf.source for leaf in leaves if isinstance(leaf.source, str)]
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise ValueError(f"reward: {twice[0]!r} is given twice; add the weights up")
    ends = {text: _ends(text) for text in texts}

    def of_path(text: str) -> str:
        """The shortest end of a path that no other one ends in."""
        others = {end for other in texts if other != text for end in ends[other]}
        return next((end for end in ends[text] if end not in others), text)

    names = {text: of_path(text) for text in texts}
    taken = set(names.values())

    def free(name: str) -> str:
        """`min`, `min2`, ... for what has no path."""
        numbered = itertools.chain([name], (f"{name}{n}" for n in itertools.count(2)))
        found = next(x for x in numbered if x not in taken)
        taken.add(found)
        return found

    def name(term: RewardTerm) -> RewardTerm:
        if isinstance(term.source, str):
            return term._replace(name=names[term.source])
        return term._replace(name=free(function_name(term.source)))

    def named(term: RewardTerm) -> RewardTerm:
        if not term.ensemble:
            return name(term)
        members = tuple(map(name, term.ensemble.members))
        ensemble = term.ensemble._replace(members=members)
        return term._replace(name=free(ensemble.how), ensemble=ensemble)

    return tuple(map(named, terms))


def _ends(source: str) -> list[str]:
    """ "model", "a/model", ... of a/model; "f", "a.py:f", ... of dir/a.py:f."""
    path, _, name = source.rpartition(":") if is_function(source) else (source, "", "")
    parts = PurePath(path).parts
    ends = [str(PurePath(*parts[i:])) for i in reversed(range(len(parts)))]
    return [name, *(f"{end}:{name}" for end in ends)] if name else ends


def function_name(function: Callable) -> str:
    """A function's own name; a lambda's is "lambda", an object's that of its class."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "lambda" if name == "<lambda>" else name
