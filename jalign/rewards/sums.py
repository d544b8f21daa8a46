"""The language of `--reward`: "gsm8k + 0.5*style.py:polite" -> weighted functions."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jalign.pretrained import Opened, Pretrained, load_pretrained, open_pretrained
from jalign.rewards.functions import TIMEOUT, checked, load_function
from jalign.rewards.samples import RewardFn, each_reward
from jalign.rewards.scorer import model_reward
from jalign.rewards.verifiers import VERIFIERS

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<source>\S(?:.*\S)?)")


class RewardTerm(NamedTuple):
    """One summand of a reward.

    Attributes:
      weight: its factor.
      name: in the metrics, `rewards/NAME/mean`.
      source: a built-in verifier, FILE.py:FUNCTION, or a reward checkpoint.
    """

    weight: float
    name: str
    source: str


def parse_rewards(text: str) -> tuple[RewardTerm, ...]:
    """The terms of a reward: [WEIGHT*]SOURCE, with " + " between them.

    The plus stands between spaces, since a path may hold one.

    Args:
      text: for example "gsm8k + 0.5*style.py:polite".

    Returns: the terms in their order, with different names.
    Raises: ValueError that names the part it cannot use.
    """
    terms: dict[str, RewardTerm] = {}
    for part in re.split(r"\s\+\s", f" {text} "):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"reward {text!r}: expected [WEIGHT*]SOURCE between the plus signs, as "
                "in 'gsm8k + 0.5*style.py:polite'"
            )
        source = match["source"]
        term = RewardTerm(float(match["weight"] or 1.0), _name(source), source)
        if term.name in terms:
            raise ValueError(
                f"reward {text!r}: two terms are called {term.name!r} in the metrics; "
                "add them up, or rename one"
            )
        terms[term.name] = term
    return tuple(terms.values())


def load_reward(
    source: str, *, timeout: float | None = TIMEOUT, **options: Any
) -> RewardFn:
    """The function that a `--reward` names.

    Args:
      source: a reward checkpoint, FILE.py:FUNCTION, the name of a built-in check, or a
        weighted sum of them, as in "gsm8k + 0.5*style.py:polite".
      timeout: seconds for a call of a Python function.
      options: of load_pretrained, for a checkpoint.

    Raises: as parse_rewards and load_term.
    """
    terms = parse_rewards(source)
    functions = [f for f, _ in load_terms(terms, timeout=timeout, **options)]
    if len(terms) == 1 and terms[0].weight == 1:
        return functions[0]
    return weighted_sum(functions, [term.weight for term in terms])


def load_term(
    source: str, *, timeout: float | None = TIMEOUT, **options: Any
) -> tuple[RewardFn, Pretrained | None]:
    """The function of a term, and the model behind it where there is one.

    Args:
      source: of a RewardTerm.
      timeout: seconds for a call of a Python function.
      options: of load_pretrained, for a checkpoint.

    Raises: ValueError if there is nothing of this name; what load_function and
      load_pretrained raise.
    """
    if source in VERIFIERS:
        return checked(VERIFIERS[source], name=source), None
    if is_function(source):
        return load_function(source, timeout=timeout), None
    scorer = load_pretrained(open_scorer(source), **options)
    return model_reward(*scorer), scorer


def open_scorer(source: str) -> Opened:
    """A reward checkpoint, opened: a directory or a hub id.

    Raises: ValueError if there is nothing of this name; as `open_pretrained`.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if not Path(source).expanduser().is_dir() and not is_hub_id:
        close = difflib.get_close_matches(source, VERIFIERS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"reward {source!r} is not FILE.py:FUNCTION, no directory, no hub id "
            f"(OWNER/NAME), and not built in ({', '.join(VERIFIERS)}){hint}"
        )
    return open_pretrained(source, head="scalar")


def is_model(source: str) -> bool:
    """Whether a source is neither built in nor a function."""
    return source not in VERIFIERS and not is_function(source)


def load_terms(
    terms: Sequence[RewardTerm], *, timeout: float | None = TIMEOUT, **options: Any
) -> list[tuple[RewardFn, Pretrained | None]]:
    """`load_term` of each; what is quick to refuse (a file, a folder) comes first.

    Raises: as load_term.
    """
    sources = [term.source for term in terms]
    loaded = {
        source: load_term(source, timeout=timeout)
        for source in sources
        if not is_model(source)
    }
    for source in sources:
        if is_model(source):
            open_scorer(source)
    return [loaded.get(source) or load_term(source, **options) for source in sources]


def weighted_sum(functions: Sequence[RewardFn], weights: Sequence[float]) -> RewardFn:
    """One function that adds up several.

    Args:
      functions: K reward functions.
      weights: K numbers.

    Returns: a RewardFn that raises ValueError naming the row whose sum is not finite.
    """

    stacked, factors = each_reward(functions), np.asarray(weights, np.float32)

    def total(prompts, completions, rows, *, samples=None):
        parts = stacked(prompts, completions, rows, samples=samples)
        with np.errstate(over="ignore", invalid="ignore"):
            sums = parts @ factors
        if not np.isfinite(sums).all():
            row = int(np.argmin(np.isfinite(sums)))
            raise ValueError(
                f"reward: row {row} adds up {parts[row].tolist()} to {sums[row]}"
            )
        return sums

    return total


def is_function(source: str) -> bool:
    """Whether a source names `file.py:function` and not a checkpoint."""
    return source.rpartition(":")[0].endswith(".py")


def _name(source: str) -> str:
    """`f` of a.py:f, the last part of a directory or hub id."""
    if is_function(source):
        return source.rpartition(":")[2]
    return source.rstrip("/").rpartition("/")[2] or source
