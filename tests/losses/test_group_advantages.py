"""Tests for jalign/losses/group_advantages.py."""

import numpy as np
import pytest

from jalign.losses import (
    gdpo_advantages,
    group_advantages,
    leave_one_out_advantages,
    optimal_baseline_advantages,
)

# Three rows of group 7, one filler of it; two of group -1; a group of one; filler.
IDS = np.int32([7, -1, 7, 7, 2, -1, 7, 7])
MASK = np.array([1, 1, 1, 0, 1, 1, 1, 0], bool)
REWARDS = np.float32([1.0, 5.0, 2.0, 9.0, 3.0, -1.0, 4.5, np.nan])


def by_group(formula, rewards=REWARDS, mask=MASK):
    """formula(rewards of a group) for each, in float64; 0 for a group of one."""
    out = np.zeros(len(rewards))
    for group in set(IDS.tolist()):
        rows = np.flatnonzero((IDS == group) & mask)
        if len(rows) > 1:
            out[rows] = formula(rewards[rows].astype("f8"))
    return out


def standard(r, eps=1e-4):
    return (r - r.mean()) / (r.std(ddof=1) + eps)


def test_group_statistics_are_of_the_counted_rows_with_the_same_id():
    got = group_advantages(REWARDS, IDS, MASK)
    np.testing.assert_allclose(got, by_group(standard), rtol=1e-5, atol=1e-6)
    got = group_advantages(REWARDS, IDS, MASK, scale_by_std=False)
    want = by_group(lambda r: r - r.mean())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(want) == 5


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others():
    def others(r):
        return np.array([x - np.delete(r, i).mean() for i, x in enumerate(r)])

    got = leave_one_out_advantages(REWARDS, IDS, MASK)
    np.testing.assert_allclose(got, by_group(others), rtol=1e-5, atol=1e-6)


LENGTHS = np.array([2, 3, 1, 0, 2, 1, 4, 0])  # 0 where MASK is False
TOKENS = np.arange(4) < LENGTHS[:, None]
TOKENS[0] = [0, 1, 0, 1]  # lengths count tokens, wherever they stand


def test_the_optimal_baseline_is_the_mean_weighted_by_length():
    want = np.zeros(8)
    for group in (7, -1):
        rows = np.flatnonzero((IDS == group) & MASK)
        r, l = REWARDS[rows].astype("f8"), LENGTHS[rows]
        want[rows] = r - (l * r).sum() / l.sum()
    got = optimal_baseline_advantages(REWARDS, IDS, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.count_nonzero(want) == 5
    alike = np.ones((8, 3), bool) & MASK[:, None]
    got = optimal_baseline_advantages(REWARDS, IDS, alike)
    want = group_advantages(REWARDS, IDS, MASK, scale_by_std=False)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-25, 0.1, 1.0, 1e4 / 3])
def test_equal_rewards_give_exactly_zero(value):
    rewards = np.full(21, value, "f4")
    ids, mask = np.zeros(21, "i4"), np.ones(21, bool)
    for function in (group_advantages, leave_one_out_advantages):
        assert not np.any(function(rewards, ids, mask))
    tokens = np.arange(21) <= np.arange(21)[:, None]
    assert not np.any(optimal_baseline_advantages(rewards, ids, tokens))


def test_rewards_that_differ_beside_a_large_mean_still_count():
    rewards, ids = np.float32([1e4, 1e4 + 1]), np.zeros(2, "i4")
    got = group_advantages(rewards, ids, np.ones(2, bool))
    np.testing.assert_allclose(got, [-0.707, 0.707], atol=2e-3)


def test_nothing_counted_is_zero():
    mask = np.zeros(8, bool)
    assert not np.any(group_advantages(REWARDS, IDS, mask))
    assert not np.any(leave_one_out_advantages(REWARDS, IDS, mask))
    assert not np.any(optimal_baseline_advantages(REWARDS, IDS, TOKENS & False))
    both = np.stack([REWARDS] * 2, 1), np.float32([1, 1])
    assert not np.any(gdpo_advantages(*both, IDS, np.zeros((8, 2), bool)))


def test_gdpo_normalises_each_reward_then_the_sum():
    rng = np.random.default_rng(0)
    rewards = np.float32(rng.normal(size=(8, 3)) * [1.0, 100.0, 1.0])
    mask = np.stack([MASK] * 3, 1)
    mask[0, 1] = mask[:, 2] = False  # one does not apply to a row, one to none
    rewards[~mask] = np.nan
    weights = np.float32([1.0, 0.5, 3.0])
    parts = [
        w * by_group(standard, rewards[:, k], mask[:, k])
        for k, w in enumerate(weights[:2].astype("f8"))
    ]
    want = np.zeros(8)
    want[MASK] = standard(np.sum(parts, 0)[MASK])
    got = gdpo_advantages(rewards, weights, IDS, mask)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_rewards_agree_up_to_a_millionth_of_the_largest():
    ids, mask = np.zeros(2, "i4"), np.ones(2, bool)
    for gap, agree in ((2.0**-20, True), (2.0**-19, False)):  # deviations 0.7, 1.3e-6
        rewards = np.float32([1.0, 1.0 + gap])
        got = leave_one_out_advantages(rewards, ids, mask)
        np.testing.assert_array_equal(got, [0, 0] if agree else [-gap, gap])


def test_gdpo_refuses_a_mask_of_other_rewards():
    both, weights = np.stack([REWARDS] * 2, 1), np.ones(2, "f4")
    for mask in (np.ones((8, 3), bool), np.ones((8, 2), "f4"), MASK):
        with pytest.raises(AssertionError):
            gdpo_advantages(both, weights, IDS, mask)


def test_an_optimal_baseline_refuses_a_mask_that_has_no_tokens():
    for mask in (MASK, np.ones((8, 2), "f4")):
        with pytest.raises(AssertionError):
            optimal_baseline_advantages(REWARDS, IDS, mask)
