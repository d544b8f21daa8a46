"""The language of `--reward`: "gsm8k + 0.5*style.py:polite" -> weighted functions."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jalign import data, models
from jalign.models.hf_read import config_of
from jalign.rewards.functions import RewardFn, checked, load_reward
from jalign.rewards.scorer import model_reward
from jalign.rewards.verifiers import VERIFIERS
from jalign.types import PyTree

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


class Judge(NamedTuple):
    """A loaded reward checkpoint.

    Attributes:
      model: with a scalar head.
      params: its parameters.
      tokenizer: its own.
    """

    model: models.Model
    params: PyTree
    tokenizer: Any


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


def load_term(source: str, **options: Any) -> tuple[RewardFn, Judge | None]:
    """The function of a term, and the model behind it where there is one.

    Args:
      source: of a RewardTerm.
      options: of models.load, for a checkpoint.

    Raises: ValueError if there is nothing of this name; what load_reward and
      models.load raise.
    """
    if source in VERIFIERS:
        return checked(VERIFIERS[source], name=source), None
    if is_function(source):
        return load_reward(source), None
    source = model_of(source)
    judge = Judge(*models.load(source, **options), data.load_tokenizer(source))
    return model_reward(*judge), judge


def model_of(source: str) -> str:
    """The source, where it may be a directory or a hub id.

    Raises: ValueError if there is nothing of this name.
    """
    if not Path(source).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        close = difflib.get_close_matches(source, VERIFIERS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"reward {source!r} is not FILE.py:FUNCTION, no directory, no hub id "
            f"(OWNER/NAME), and not built in ({', '.join(VERIFIERS)}){hint}"
        )
    return source


def is_model(source: str) -> bool:
    """Whether a source is neither built in nor a function."""
    return source not in VERIFIERS and not is_function(source)


def load_terms(
    terms: Sequence[RewardTerm], **options: Any
) -> list[tuple[RewardFn, Judge | None]]:
    """load_term of each; what is quick to refuse (a file, a folder) comes first.

    Raises: as load_term; ValueError for a checkpoint that is no reward model.
    """
    sources = [term.source for term in terms]
    loaded = {source: load_term(source) for source in sources if not is_model(source)}
    for source in sources:
        if is_model(source):
            labels = config_of(model_of(source)).num_labels
            if labels != 1:
                raise ValueError(
                    f"reward {source!r}: no reward model (num_labels {labels}, not 1)"
                )
    return [loaded.get(source) or load_term(source, **options) for source in sources]


def weighted_sum(functions: Sequence[RewardFn], weights: Sequence[float]) -> RewardFn:
    """One function that adds up several.

    Args:
      functions: K reward functions.
      weights: K numbers.
    """

    def total(prompts, completions, rows):
        parts = [f(prompts, completions, rows) for f in functions]
        return np.stack(parts, axis=1) @ np.asarray(weights, np.float32)

    return total


def is_function(source: str) -> bool:
    """Whether a source names `file.py:function` and not a checkpoint."""
    return source.rpartition(":")[0].endswith(".py")


def _name(source: str) -> str:
    """`f` of a.py:f, the last part of a directory or hub id."""
    if is_function(source):
        return source.rpartition(":")[2]
    return source.rstrip("/").rpartition("/")[2] or source
