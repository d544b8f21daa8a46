"""One entry for every name in losses.__all__: how to call it in the property tests."""

from typing import Any

import numpy as np

from jalign import losses
from tests.losses.case import BOOLS, INTEGERS, SIZES, Case, like
from tests.losses.cases_policy import POLICY_CASES
from tests.losses.cases_preference import PREFERENCE_CASES


def _row_logps(logits, targets, consts):
    return losses.logps_from_logits(logits, targets)


_PAIR = like("B", "chosen", "rejected")
_PPO = like("BT", "logps", "old_logps", "advantages")
_KL = like("BT", "logps", "ref_logps")
_X = like("BT", "x", "mask")
_HEAD = {"hidden": "BTD", "unembed": "DV", "targets": "BT"}
_HEAD_OPTIONS: dict[str, Any] = {
    "grads": ("hidden", "unembed"),
    "any_float": ("hidden", "unembed"),
    "pad": 7.0,
}
_LOGITS = {"logits": "BTV", "targets": "BT"}

CASES = {
    "adaptive_kl_update": Case(
        {"kl_coef": "", "kl": ""},
        "",
        scalars={"target": 6.0, "horizon": 100.0, "num_samples": 8},
        any_float=("kl_coef", "kl"),
    ),
    "approx_kl": Case(like("BT", "logps", "old_logps"), "BT"),
    "bradley_terry_loss": Case(
        _PAIR, "B", ("chosen", "rejected"), scalars={"margin": 0.5}
    ),
    "clip_frac": Case(_PPO, "BT", scalars={"clip_eps": 0.2}),
    "cross_entropy": Case(
        _LOGITS,
        "BT",
        ("logits",),
        scalars={"label_smoothing": 0.1, "z_loss": 1e-3},
        pad=7.0,
    ),
    "entropy_from_logits": Case({"logits": "BTV"}, "BT", ("logits",), pad=7.0),
    "fixed_length_mean": Case(_X, "", ("x",), scalars={"length": 4.0}, reads_mask=True),
    "gae": Case(
        like("BT", "rewards", "values", "mask"),
        "BT",
        scalars={"gamma": 0.9, "gae_lambda": 0.8},
        reads_mask=True,
    ),
    "implicit_rewards": Case(like("B", "x", "ref"), "B", scalars={"beta": 0.1}),
    "kl_k1": Case(_KL, "BT", ("logps",)),
    "kl_k2": Case(_KL, "BT", ("logps",)),
    "kl_k3": Case(_KL, "BT", ("logps",)),
    "kl_shaped_rewards": Case(
        {"rewards": "B", **_KL, "mask": "BT"},
        "BT",
        scalars={"beta": 0.1},
        reads_mask=True,
    ),
    "load_balancing_loss": Case(like("V", "load", "probability"), "", ("probability",)),
    "logps_from_logits": Case(_LOGITS, "BT", ("logits",), pad=7.0),
    "map_logits": Case(_HEAD, "BT", **_HEAD_OPTIONS),
    "masked_mean": Case(_X, "", ("x",), reads_mask=True),
    "masked_var": Case(_X, "", ("x",), reads_mask=True),
    "masked_whiten": Case(_X, "BT", ("x",), reads_mask=True),
    "ppo_value_loss": Case(
        like("BT", "values", "old_values", "returns"),
        "BT",
        ("values",),
        scalars={"clip_eps": 0.2},
    ),
    "reward_center_loss": Case(_PAIR, "B", ("chosen", "rejected")),
    "sequence_logps": Case(
        like("BT", "logps", "mask"), "B", ("logps",), reads_mask=True
    ),
    "sequence_mean": Case(_X, "", ("x",), reads_mask=True),
    "token_cross_entropy": Case(
        _HEAD,
        "BT",
        scalars={"label_smoothing": 0.1, "chunk_size": 16},
        **_HEAD_OPTIONS,
    ),
    "token_logps": Case(
        _HEAD,
        "BT",
        scalars={"chunk_size": 16, "return_entropy": True},
        **_HEAD_OPTIONS,
    ),
    "token_mean": Case(_X, "", ("x",), reads_mask=True),
}
CASES |= PREFERENCE_CASES | POLICY_CASES


def call(name: str, *arrays):
    """losses.<name> on the arrays of its case, with its scalars."""
    if name == "map_logits":
        return losses.map_logits(_row_logps, *arrays, chunk_size=16)
    return getattr(losses, name)(*arrays, **CASES[name].scalars)


def make_mask(case: Case) -> np.ndarray:
    """Which outputs count: [B, T], or [B] if no argument has time; a whole row not."""
    shape = [
        SIZES[a] for a in ("BT" if any("T" in a for a in case.args.values()) else "B")
    ]
    mask = np.random.default_rng(1).random(shape) < 0.7
    mask[0], mask[1] = True, False
    return mask


def make_arrays(case: Case) -> list[np.ndarray]:
    """Ordinary arguments: normal floats, ids in the vocabulary, the mask above."""
    rng = np.random.default_rng(0)
    arrays = []
    for name, axes in case.args.items():
        shape = [SIZES[a] for a in axes]
        if name == "mask":
            arrays.append(make_mask(case))
        elif name in BOOLS:
            arrays.append(rng.random(shape) < 0.5)
        elif name in INTEGERS:
            arrays.append(rng.integers(0, INTEGERS[name], shape, dtype=np.int32))
        else:
            arrays.append(np.asarray(rng.normal(size=shape), np.float32))
    return arrays
