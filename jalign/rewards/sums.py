"""Rewards, loaded and added up: the terms of `--reward` (terms.py) as one function.

Several rewards as one, an ensemble: Coste et al. 2023, "Reward Model Ensembles Help
Mitigate Overoptimization" (arXiv:2310.02743): mean, worst-case (`min`) and
uncertainty-weighted optimization. That is mean - C*var there; `std` is a variant in the
unit of the reward.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.paths import located
from jalign.pretrained import Opened, Pretrained, load_pretrained, open_pretrained
from jalign.rewards.functions import TIMEOUT, checked, load_function
from jalign.rewards.samples import RewardFn, each_reward
from jalign.rewards.scorer import model_reward
from jalign.rewards.terms import (
    Ensemble,
    Rewards,
    RewardTerm,
    Source,
    function_name,
    is_function,
    parse_rewards,
    single_sources,
)
from jalign.rewards.verifiers import VERIFIERS
from jalign.settings import nearest

_log = logging.getLogger("jalign.rewards")


class Loaded(NamedTuple):
    """A reward that is ready to be asked.

    Attributes:
      function: a RewardFn that gives float32 [B, K], a column for each name of weights.
      weights: name -> weight in the sum: the terms', and 0 for what is only shown of an
        ensemble: its members, and NAME/member_std, their deviation in each row.
      reward_models: behind each of `single_sources`; None for a function.
    """

    function: RewardFn
    weights: dict[str, float]
    reward_models: list[Pretrained | None]


def load_reward(
    source: Rewards, *, timeout: float | None = TIMEOUT, **options: Any
) -> RewardFn:
    """The function that a `--reward` names.

    Args:
      source: a reward checkpoint, FILE.py:FUNCTION, the name of a built-in check, an
        ensemble of these, or a weighted sum, as in "gsm8k + 0.5*min(runs/a/model,
        runs/b/model)"; also a function, or a list (terms.parse_rewards).
      timeout: seconds for a call of a Python function.
      options: of load_pretrained, for a checkpoint.

    Returns: a RewardFn of float32 [B], without NaN: see `add_up`.
    Raises: as parse_rewards and load_term.
    """
    loaded = load_terms(parse_rewards(source), timeout=timeout, **options)
    return _summed(loaded.function, list(loaded.weights.values()))


def load_term(
    source: Source, *, timeout: float | None = TIMEOUT, **options: Any
) -> tuple[RewardFn, Pretrained | None]:
    """The function of a term, and the model behind it where there is one.

    Args:
      source: of a RewardTerm.
      timeout: seconds for a call of a Python function.
      options: of load_pretrained, for a checkpoint.

    Raises: ValueError if there is nothing of this name; what load_function and
      load_pretrained raise.
    """
    return _loaded(_opened(source, timeout), **options)


def _opened(source: Source, timeout: float | None) -> RewardFn | Opened:
    """A function that is ready, or a checkpoint that is still to be loaded."""
    if not isinstance(source, str):
        return checked(source, name=function_name(source), timeout=timeout)
    if source in VERIFIERS:
        return checked(VERIFIERS[source], name=source)
    if is_function(source):
        return load_function(source, timeout=timeout)
    return open_scorer(source)


def _loaded(
    opened: RewardFn | Opened, **options: Any
) -> tuple[RewardFn, Pretrained | None]:
    if not isinstance(opened, Opened):
        return opened, None
    scorer = load_pretrained(opened, **options)
    return model_reward(*scorer), scorer


def open_scorer(source: str) -> Opened:
    """A reward checkpoint, opened: a directory, its URL or a hub id.

    Raises: ValueError if there is nothing of this name; as `open_pretrained`.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if not located(source).expanduser().is_dir() and not is_hub_id:
        hint = nearest(source, VERIFIERS)
        if "(" in source:
            hint += "; ensembles are mean(A, B, ...) and min(A, B, ...)"
        raise ValueError(
            f"reward {source!r} is not FILE.py:FUNCTION, no directory, no hub id "
            f"(OWNER/NAME), and not built in ({', '.join(VERIFIERS)}){hint}"
        )
    return open_pretrained(source, head="scalar")


def load_terms(
    terms: Sequence[RewardTerm],
    *,
    timeout: float | None = TIMEOUT,
    wrap: Callable[[RewardFn], RewardFn] = lambda function: function,
    **options: Any,
) -> Loaded:
    """The functions and models of terms; what is quick to refuse comes first.

    Args:
      terms: of parse_rewards.
      timeout: seconds for a call of a Python function.
      wrap: what becomes of each Python function.
      options: of load_pretrained, for a checkpoint.

    Raises: as load_term.
    """
    leaves = single_sources(terms)

    def is_model(leaf: RewardTerm) -> bool:
        return not is_function(leaf.source) and leaf.source not in VERIFIERS

    quick_first = sorted(leaves, key=is_model)
    opened = {leaf.name: _opened(leaf.source, timeout) for leaf in quick_first}
    loaded = [_loaded(opened[leaf.name], **options) for leaf in leaves]
    asked = each_reward([f if reward_model else wrap(f) for f, reward_model in loaded])
    reward_models = [reward_model for _, reward_model in loaded]

    def columns(prompts, completions, rows, *, samples=None):
        values = asked(prompts, completions, rows, samples=samples)
        return combine(terms, values)

    return Loaded(columns, column_weights(terms), reward_models)


def weighted_sum(functions: Sequence[RewardFn], weights: Sequence[float]) -> RewardFn:
    """One function that adds up several.

    Args:
      functions: K reward functions.
      weights: K numbers.

    Returns: a RewardFn of float32 [B]; raises as `add_up`.
    """
    return _summed(each_reward(functions), weights)


def _summed(columns: RewardFn, weights: Sequence[float]) -> RewardFn:
    def total(prompts, completions, rows, *, samples=None):
        return add_up(columns(prompts, completions, rows, samples=samples), weights)

    return total


def column_weights(terms: Sequence[RewardTerm]) -> dict[str, float]:
    """Name -> weight of each column of `combine`; 0 for what is only shown."""
    weights = {term.name: term.weight for term in terms}
    for term in terms:
        if term.ensemble:
            shown = [member.name for member in term.ensemble.members]
            weights |= dict.fromkeys([*shown, f"{term.name}/member_std"], 0.0)
    return weights


def combine(terms: Sequence[RewardTerm], values: np.ndarray) -> np.ndarray:
    """The rewards of terms, of those of their single sources.

    Args:
      terms: N of parse_rewards.
      values: float32 [B, L], a column for each of `terms.single_sources`.

    Returns: float32 [B, K]: N columns, one a term; then, for each ensemble, those of
      its members and their standard deviation over them.
    Raises: ValueError where a member does not judge a row (NaN).
    """
    found, shown, start = [], [], 0
    for term in terms:
        if term.ensemble is None:
            found.append(values[:, start])
            start += 1
            continue
        width = len(term.ensemble.members)
        members, start = values[:, start : start + width], start + width
        found.append(ensemble_reward(term.ensemble, members))
        shown += [*members.T, members.std(axis=1)]
    return np.stack([*found, *shown], axis=1)


def ensemble_reward(ensemble: Ensemble, members: np.ndarray) -> np.ndarray:
    """min or mean - penalty * (std or var) over the members, the population's.

    Args:
      ensemble: how.
      members: float32 [B, M].

    Returns: float32 [B].
    Raises: ValueError where a member does not judge a row (NaN).
    """
    if np.isnan(members).any():
        row, column = map(int, np.argwhere(np.isnan(members))[0])
        raise ValueError(
            f"reward {ensemble}: {ensemble.members[column].name} gave None for row "
            f"{row}; every member of an ensemble judges every row"
        )
    if ensemble.how == "min":
        return members.min(axis=1)
    exact = members.astype(np.float64)
    spreads = {"std": exact.std, "var": exact.var}
    spread = spreads[ensemble.spread](axis=1) if ensemble.spread else 0.0
    return (exact.mean(axis=1) - ensemble.penalty * spread).astype(np.float32)


def add_up(columns: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum of rewards.

    A function that does not judge a row (NaN) adds nothing to it, as in TRL; a row that
    none judges has the reward 0, and a warning counts them.

    Args:
      columns: float32 [B, K].
      weights: K numbers.

    Returns: float32 [B].
    Raises: ValueError naming the row whose sum is not finite.
    """
    judged = ~np.isnan(columns)
    if alone := int((~judged.any(axis=1)).sum()):
        _log.warning(
            "%d of %d completions were judged by no reward function (None) and count "
            "as 0: leave their rows out of the data",
            alone,
            len(columns),
        )
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.where(judged, columns, 0.0) @ np.asarray(weights, np.float32)
    if not np.isfinite(sums).all():
        row = int(np.argmin(np.isfinite(sums)))
        raise ValueError(
            f"reward: row {row} adds up {columns[row].tolist()} to {sums[row]}"
        )
    return sums


def mean_of_judged(rewards: np.ndarray) -> float:
    """The mean of the rewards [B] of rows that were judged (not NaN); 0 if none was."""
    found = rewards[~np.isnan(rewards)]
    return float(found.mean()) if found.size else 0.0
