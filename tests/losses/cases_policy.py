"""Cases of SFT, policy gradients, advantages, divergences and distillation."""

from typing import Any

from tests.losses.case import Case, like

_PPO = like("BT", "logps", "old_logps", "advantages")
_SEQUENCE = like("BT", "logps", "old_logps", "advantages", "mask")
_SAMPLER = like("BT", "old_logps", "sampler_logps")
_GROUP = like("B", "rewards", "group_ids", "mask")
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

POLICY_CASES = {
    "accuracy_from_logits": Case({"logits": "BTV", "targets": "BT"}, "BT", pad=7.0),
    "apa_loss": Case(
        like("BT", "logps", "ref_logps", "advantages"),
        "BT",
        ("logps",),
        scalars={"beta": 0.5},
    ),
    "cispo_loss": Case(_PPO, "BT", ("logps",), scalars=_BOUNDS),
    "dft_loss": Case(like("BT", "logps"), "BT", ("logps",)),
    "forward_kl_from_logits": Case(
        _BOTH_LOGITS, "BT", scalars={"temperature": 0.9}, **_LOGITS_OPTIONS
    ),
    "gdpo_advantages": Case(
        {"rewards": "BT", "weights": "T", "group_ids": "B", "mask": "BT"},
        "B",
        reads_mask=True,
    ),
    "gmpo_loss": Case(
        _SEQUENCE, "BT", ("logps",), scalars={"clip_eps": 0.4}, reads_mask=True
    ),
    "group_advantages": Case(_GROUP, "B", reads_mask=True),
    "gspo_loss": Case(_SEQUENCE, "BT", ("logps",), scalars=_CLIP, reads_mask=True),
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
    "leave_one_out_advantages": Case(_GROUP, "B", reads_mask=True),
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
    "optimal_baseline_advantages": Case(
        {"rewards": "B", "group_ids": "B", "mask": "BT"}, "B", reads_mask=True
    ),
    "reinforce_loss": Case(like("BT", "logps", "advantages"), "BT", ("logps",)),
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
    "sapo_loss": Case(
        _PPO,
        "BT",
        ("logps",),
        scalars={"temperature_pos": 1.0, "temperature_neg": 1.05},
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
    "vespo_loss": Case(_SEQUENCE, "BT", ("logps",), reads_mask=True),
}
