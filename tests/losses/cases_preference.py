"""Cases of the property tests: reward models and preference losses."""

import inspect

from jalign.train.loss_table import REGISTRY, Entry
from tests.losses.case import Case, like

_SIDES = ("chosen", "rejected")
_REFERENCED = like("B", *_SIDES, "ref_chosen", "ref_rejected")
_BETA = {"beta": 0.3}
_SMOOTHED = {**_BETA, "label_smoothing": 0.1}
_UNPAIRED = like("B", "logps", "ref_logps", "desirable")
_SCORE = Case(like("B", "logps", "ref_logps"), "B", ("logps",))
_RANKING = Case(like("BT", "rewards", "mask"), "B", ("rewards",), reads_mask=True)


def _of_pairs(entry: Entry) -> Case:
    """With the function's own scalars, the shared ones as above."""
    parameters = inspect.signature(entry.function).parameters.values()
    scalars = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    shared = {**_SMOOTHED, "shift": 0.2, "alpha": 0.25}
    given = {name: shared.get(name, value) for name, value in scalars.items()}
    arrays = like("B", *list(_REFERENCED)[: len(entry.inputs)])
    return Case(arrays, "B", _SIDES, given)


PREFERENCE_CASES = {
    entry.function.__name__: _of_pairs(entry)
    for entry in REGISTRY["dpo"].values()
    if len(entry.inputs) in (2, 4)  # without or with a reference
}
PREFERENCE_CASES |= {
    "alpha_score": _SCORE._replace(scalars={"alpha": 0.3}),
    "aot_loss": Case(
        _REFERENCED | like("B", "mask"), "B", _SIDES, _SMOOTHED, reads_mask=True
    ),
    "aot_unpaired_loss": Case(
        _REFERENCED | like("B", "mask"), "B", _SIDES, _SMOOTHED, reads_mask=True
    ),
    "attribute_regression_loss": Case(
        like("BT", "scores", "ratings"), "BT", ("scores",)
    ),
    "average_logps": Case(
        like("BT", "logps", "mask"), "B", ("logps",), reads_mask=True
    ),
    "bco_loss": Case(_UNPAIRED, "B", ("logps",), {**_BETA, "shift": 0.2}),
    "bco_shift_update": Case(
        {"shift": "", "count": "", "rewards": "B", "mask": "B"},
        "",
        any_float=("shift", "count"),
        reads_mask=True,
    ),
    "collision_entropy_from_logits": Case(
        {"logits": "BTV"}, "BT", ("logits",), pad=7.0
    ),
    "forward_kl_score": _SCORE,
    "js_score": _SCORE,
    "kto_kl": Case(like("B", "logps", "ref_logps", "mask"), "", reads_mask=True),
    "kto_loss": Case(
        _UNPAIRED,
        "B",
        ("logps",),
        {**_BETA, "kl": 0.4, "desirable_weight": 1.2, "undesirable_weight": 0.8},
    ),
    "ld_weights": Case(
        like("BT", "mask", "other_mask"), "BT", scalars={"alpha": 0.5}, reads_mask=True
    ),
    "moving_reference": Case(
        like("B", "ref_params", "params"),
        "B",
        scalars={"alpha": 0.6},
        any_float=("ref_params", "params"),
    ),
    "nash_md_loss": Case(
        like("B", "logps", "ref_logps", "win_probs"), "B", ("logps",), _BETA
    ),
    "pairwise_ranking_loss": _RANKING,
    "plackett_luce_loss": _RANKING,
    "process_reward_loss": Case(like("BT", "logits", "labels"), "BT", ("logits",)),
    "reverse_kl_score": _SCORE,
    "tpo_loss": Case(
        like("B", *_SIDES, "gold"),
        "B",
        (*_SIDES, "gold"),
        {**_SMOOTHED, "alpha": 0.7, "gamma": 0.5},
    ),
    "wpo_weights": Case(
        like("BT", "logps", "collision_entropy", "mask"), "B", reads_mask=True
    ),
    "xpo_loss": Case(
        _REFERENCED | like("B", "explore"),
        "B",
        (*_SIDES, "explore"),
        {**_BETA, "alpha": 0.1},
    ),
}
