"""What GRPO makes of scored groups."""

import numpy as np
import pytest

from jalign.train.grpo import (
    estimate_group_advantages,
    group_metrics,
    make_group_rollout,
)
from jalign.train.online_config import GRPOOptions
from jalign.train.rollout import Scored
from jalign.types import TokenBatch

SCORES = np.float32([1, 0, 0, 3, 2, 2, 2, 2, -1, 5, 0.5, 0])  # three groups of four
GROUPS = SCORES.astype(np.float64).reshape(3, 4)
LENGTHS = np.array([[1, 2, 3, 4], [5, 1, 1, 1], [3, 1, 4, 1]])
TOKENS = np.arange(5) < LENGTHS.reshape(-1, 1)


def options(**changes):
    return GRPOOptions(group_size=4, **changes)


def centered():
    return GROUPS - GROUPS.mean(1, keepdims=True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda: centered() / (GROUPS.std(1, ddof=1, keepdims=True) + 1e-4)),
        ({"scale_rewards": "none"}, centered),
        ({"loss": "dr_grpo"}, centered),
        (
            {"loss": "dr_grpo", "scale_rewards": "group"},
            lambda: centered() / (GROUPS.std(1, ddof=1, keepdims=True) + 1e-4),
        ),
        (
            {"scale_rewards": "batch"},
            lambda: centered() / (GROUPS.std(ddof=1) + 1e-4),
        ),
        (
            {"loss": "rloo"},
            lambda: GROUPS - (GROUPS.sum(1, keepdims=True) - GROUPS) / 3,
        ),
        (
            {"loss": "opo"},
            lambda: GROUPS - np.average(GROUPS, 1, LENGTHS, keepdims=True),
        ),
        ({"loss": "opo", "scale_rewards": "none"}, centered),
    ],
)
def test_advantages_are_those_of_numpy(changes, expected):
    got = estimate_group_advantages(SCORES, TOKENS, options(**changes))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected().reshape(-1), rtol=1e-5, atol=1e-6)
    assert not got[4:8].any()  # a group that agrees teaches nothing


def scored_case():
    rng = np.random.default_rng(0)
    mask = np.arange(6)[None, :] < rng.integers(2, 7, 12)[:, None]
    mask[:, 0] = False
    ints = np.ones(mask.shape, np.int32)
    logps = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    return Scored(
        TokenBatch(ints, mask, ints, ints),
        logps,
        0.9 * logps,
        None,
        SCORES,
        stopped=np.arange(12) % 3 > 0,
        texts=["x"] * 12,
        reward_parts={"a": SCORES, "b": 0 * SCORES},
    )


def test_a_rollout_holds_the_advantage_at_each_token():
    scored = scored_case()
    rollout = make_group_rollout(scored, SCORES, 0.0, options())
    mask = scored.batch.completion_mask
    want = estimate_group_advantages(SCORES, mask, options())[:, None] * mask
    np.testing.assert_array_equal(rollout.advantages, want)
    assert rollout.old_logps is scored.logps
    assert rollout.sampler_logps is scored.sampler_logps
    assert rollout.values is rollout.returns is rollout.ref_logps is None


def test_truncated_completions_are_judged_but_not_trained():
    scored = scored_case()
    rollout = make_group_rollout(scored, SCORES, 0.0, options(mask_truncated=True))
    kept = scored.stopped[:, None] & scored.batch.completion_mask
    np.testing.assert_array_equal(rollout.completion_mask, kept)
    # They are still attended to, and the others' advantages are what they were.
    np.testing.assert_array_equal(rollout.segment_ids, scored.batch.segment_ids)
    for loss in ("dapo", "opo"):  # whose baseline counts the tokens of all
        how = {"loss": loss}
        full = make_group_rollout(scored, SCORES, 0.0, options(**how))
        rollout = make_group_rollout(
            scored, SCORES, 0.0, options(mask_truncated=True, **how)
        )
        np.testing.assert_array_equal(rollout.advantages[kept], full.advantages[kept])


def test_metrics_have_trls_names():
    scored = scored_case()
    row = group_metrics(scored, SCORES, 0.0, options())
    assert row["reward"] == pytest.approx(SCORES.mean())
    assert row["reward_std"] == pytest.approx(GROUPS.std(1, ddof=1).mean())
    assert row["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert row["rewards/a/mean"] == row["reward"] and row["rewards/b/std"] == 0
    lengths = scored.batch.completion_mask.sum(1)
    assert row["completions/mean_length"] == pytest.approx(lengths.mean())
    assert row["completions/max_length"] == lengths.max()
    ended = lengths[scored.stopped]
    assert row["completions/min_terminated_length"] == ended.min()
    assert row["completions/mean_terminated_length"] == pytest.approx(ended.mean())
    assert row["completions/clipped_ratio"] == pytest.approx(1 / 3)
    scored = scored._replace(stopped=np.zeros(12, bool))
    none = group_metrics(scored, SCORES, 0.0, options())
    assert none["completions/max_terminated_length"] == 0
