"""Cases of SFT, policy gradients, advantages, divergences and distillation."""

import inspect
from typing import Any

from jalign import losses
from jalign.train.loss_table import REGISTRY, Entry
from tests.losses.case import Case, like

_SEQUENCE = like("BT", "logps", "old_logps", "advantages", "mask")
_SAMPLER = like("BT", "old_logps", "sampler_logps")
_TOKEN_REWARDS = like("BT", "token_rewards", "mask")
_BOTH_LOGITS = like("BTV", "logits", "ref_logits")
_LOGITS_OPTIONS: dict[str, Any] = {"grads": ("logits",), "pad": 7.0}
_HEAD = {"hidden": "BTD", "unembed": "DV"}
_BOTH_HEADS = {**_HEAD, "ref_hidden": "BTD", "ref_unembed": "DV"}
_HEAD_OPTIONS: dict[str, Any] = {
    "grads": ("hidden", "unembed"),
    "any_float": ("hidden", "unembed", "ref_hidden", "ref_unembed"),
    "pad": 7.0,
}
_CLIP = {"clip_eps": 0.2, "clip_eps_high": 0.28}
_BOUNDS = {"min_ratio": 0.5, "max_ratio": 2.0}
_AXES = {"rewards": "B", "group_ids": "B", "mask": "B", "completion_mask": "BT"}


def _policy(entry: Entry) -> Case:
    parameters = inspect.signature(entry.function).parameters.values()
    scalars = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    shared = {**_CLIP, **_BOUNDS, "dual_clip": 3.0}
    given = {name: shared.get(name, value) for name, value in scalars.items()}
    arrays = like("BT", *entry.inputs)
    return Case(arrays, "BT", ("logps",), given, reads_mask="mask" in arrays)


def _advantages(entry: Entry) -> Case:
    axes = [(name, _AXES[name]) for name in entry.advantage_inputs]
    args = {name.removeprefix("completion_"): axis for name, axis in axes}
    return Case(args, "B", reads_mask=True)


_OF_COMMAND = [
    (function, case(entry))
    for entry in REGISTRY["grpo"].values()
    for function, case in ((entry.function, _policy), (entry.advantages, _advantages))
]
POLICY_CASES = {
    function.__name__: case
    for function, case in _OF_COMMAND
    if getattr(losses, getattr(function, "__name__", ""), None) is function
}
POLICY_CASES |= {
    "accuracy_from_logits": Case({"logits": "BTV", "targets": "BT"}, "BT", pad=7.0),
    "apa_loss": Case(
        like("BT", "logps", "ref_logps", "advantages"),
        "BT",
        ("logps",),
        scalars={"beta": 0.5},
    ),
    "dft_loss": Case(like("BT", "logps"), "BT", ("logps",)),
    "forward_kl_from_logits": Case(
        _BOTH_LOGITS, "BT", scalars={"temperature": 0.9}, **_LOGITS_OPTIONS
    ),
    "gdpo_advantages": Case(
        {"rewards": "BT", "weights": "T", "group_ids": "B", "mask": "BT"},
        "B",
        reads_mask=True,
    ),
    "gspo_token_loss": Case(
        _SEQUENCE, "BT", ("logps",), scalars=_CLIP, reads_mask=True
    ),
    "jsd_from_logits": Case(
        _BOTH_LOGITS,
        "BT",
        scalars={"beta": 0.3, "temperature": 0.9},
        **_LOGITS_OPTIONS,
    ),
    "kl_from_logits": Case(
        _BOTH_LOGITS, "BT", scalars={"temperature": 0.9}, **_LOGITS_OPTIONS
    ),
    "masked_importance_weights": Case(_SAMPLER, "BT", scalars=_BOUNDS),
    "mean_returns_to_go": Case(
        _TOKEN_REWARDS, "BT", scalars={"gamma": 0.9}, reads_mask=True
    ),
    "off_policy_mask": Case(
        like("BT", "logps", "sampler_logps", "advantages", "mask"),
        "BT",
        scalars={"threshold": 0.1},
        reads_mask=True,
    ),
    "reinforce_plus_plus_advantages": Case(
        _TOKEN_REWARDS, "BT", scalars={"gamma": 0.9}, reads_mask=True
    ),
    "reinforce_plus_plus_baseline_advantages": Case(
        {"rewards": "B", "group_ids": "B", "mask": "BT"}, "BT", reads_mask=True
    ),
    "remax_advantages": Case(like("B", "rewards", "greedy_rewards"), "B"),
    "returns_to_go": Case(
        _TOKEN_REWARDS, "BT", scalars={"gamma": 0.9}, reads_mask=True
    ),
    "reverse_kl_rewards": Case(like("BT", "logps", "ref_logps"), "BT"),
    "rloo_loss": Case(
        like("B", "logps", "old_logps", "advantages"),
        "B",
        ("logps",),
        scalars=_CLIP,
    ),
    "sequence_masked_importance_weights": Case(
        {**_SAMPLER, "mask": "BT"}, "BT", scalars=_BOUNDS, reads_mask=True
    ),
    "sequence_sum_mean": Case(like("BT", "x", "mask"), "", ("x",), reads_mask=True),
    "sequence_truncated_importance_weights": Case(
        {**_SAMPLER, "mask": "BT"}, "BT", scalars=_BOUNDS, reads_mask=True
    ),
    "token_accuracy": Case(
        {**_HEAD, "targets": "BT"},
        "BT",
        scalars={"chunk_size": 16},
        any_float=("hidden", "unembed"),
        pad=7.0,
    ),
    "token_entropy": Case(_HEAD, "BT", scalars={"chunk_size": 16}, **_HEAD_OPTIONS),
    "token_forward_kl": Case(
        _BOTH_HEADS, "BT", scalars={"chunk_size": 16}, **_HEAD_OPTIONS
    ),
    "token_jsd": Case(
        _BOTH_HEADS, "BT", scalars={"chunk_size": 16, "beta": 0.3}, **_HEAD_OPTIONS
    ),
    "token_kl": Case(_BOTH_HEADS, "BT", scalars={"chunk_size": 16}, **_HEAD_OPTIONS),
    "truncated_importance_weights": Case(_SAMPLER, "BT", scalars=_BOUNDS),
}
