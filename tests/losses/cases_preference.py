"""Cases of the property tests: reward models and preference losses."""

from typing import Any

from tests.losses.case import Case, like

_SIDES = ("chosen", "rejected")
_PAIR = like("B", *_SIDES)
_REFERENCED = like("B", *_SIDES, "ref_chosen", "ref_rejected")
_BETA = {"beta": 0.3}
_SMOOTHED = {**_BETA, "label_smoothing": 0.1}
_UNPAIRED = like("B", "logps", "ref_logps", "desirable")
_SCORE = Case(like("B", "logps", "ref_logps"), "B", ("logps",))
_RANKING = Case(like("BT", "rewards", "mask"), "B", ("rewards",), reads_mask=True)


def _pair(scalars: dict[str, Any]) -> Case:
    return Case(_REFERENCED, "B", _SIDES, scalars)


def _free(scalars: dict[str, Any]) -> Case:
    return Case(_PAIR, "B", _SIDES, scalars)


PREFERENCE_CASES = {
    "alpha_score": _SCORE._replace(scalars={"alpha": 0.3}),
    "alphapo_loss": _free({**_SMOOTHED, "alpha": 0.25, "gamma": 0.5}),
    "aot_loss": Case(
        _REFERENCED | like("B", "mask"), "B", _SIDES, _SMOOTHED, reads_mask=True
    ),
    "aot_unpaired_loss": Case(
        _REFERENCED | like("B", "mask"), "B", _SIDES, _SMOOTHED, reads_mask=True
    ),
    "apo_down_loss": _pair(_BETA),
    "apo_zero_loss": _pair(_BETA),
    "attribute_regression_loss": Case(
        like("BT", "scores", "ratings"), "BT", ("scores",)
    ),
    "average_logps": Case(
        like("BT", "logps", "mask"), "B", ("logps",), reads_mask=True
    ),
    "bco_loss": Case(_UNPAIRED, "B", ("logps",), {**_BETA, "shift": 0.2}),
    "bco_pair_loss": _pair({**_BETA, "shift": 0.2}),
    "bco_shift_update": Case(
        {"shift": "", "count": "", "rewards": "B", "mask": "B"},
        "",
        any_float=("shift", "count"),
        reads_mask=True,
    ),
    "collision_entropy_from_logits": Case(
        {"logits": "BTV"}, "BT", ("logits",), pad=7.0
    ),
    "cpo_loss": _free(_SMOOTHED),
    "discopop_loss": _pair({**_BETA, "tau": 0.05}),
    "dpop_loss": _pair({**_BETA, "penalty": 0.7}),
    "exo_pair_loss": _pair(_SMOOTHED),
    "forward_kl_score": _SCORE,
    "hinge_loss": _pair(_BETA),
    "ipo_loss": _pair(_BETA),
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
    "nca_pair_loss": _pair(_BETA),
    "orpo_loss": _free({}),
    "pairwise_ranking_loss": _RANKING,
    "plackett_luce_loss": _RANKING,
    "process_reward_loss": Case(like("BT", "logits", "labels"), "BT", ("logits",)),
    "reverse_kl_score": _SCORE,
    "robust_dpo_loss": _pair(_SMOOTHED),
    "simpo_loss": _free({**_SMOOTHED, "gamma": 0.5}),
    "sppo_hard_loss": _pair(_BETA),
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
