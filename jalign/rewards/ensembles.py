"""Several rewards as one: the mean, the worst case, the mean less its uncertainty.

Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization"
(arXiv:2310.02743): mean, worst-case (`min`) and uncertainty-weighted optimization. That
is mean - C*var there; `std` is a variant in the unit of the reward.
"""

from collections.abc import Sequence

import numpy as np

from jalign.rewards.terms import Ensemble, RewardTerm


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
