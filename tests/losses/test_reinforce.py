"""Tests for jalign/losses/advantages.py."""

import numpy as np
import pytest

from jalign.losses import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
    returns_to_go,
)

RNG = np.random.default_rng(0)
TOKEN_REWARDS = RNG.normal(size=(4, 5)).astype(np.float32)
MASK = np.array([[1] * 5, [0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0] * 5], bool)


def returns_of_row(rewards, gamma):
    """Σ_{i>=t} γ^{i-t} r_i, written out, in float64."""
    n = len(rewards)
    return [sum(gamma ** (i - t) * rewards[i] for i in range(t, n)) for t in range(n)]


def returns(gamma):
    out = np.zeros(MASK.shape)
    for row, counted in enumerate(MASK):
        rewards = TOKEN_REWARDS[row, counted].astype("f8")
        out[row, counted] = returns_of_row(rewards, gamma)
    return out


def whitened(x):
    counted = x[MASK]
    return MASK * (x - counted.mean()) / np.sqrt(counted.var(ddof=1) + 1e-8)


def test_returns_are_the_explicit_sum_over_the_counted_tokens():
    for gamma in (1.0, 0.9, 0.0):
        got = returns_to_go(TOKEN_REWARDS, MASK, gamma=gamma)
        np.testing.assert_allclose(got, returns(gamma), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        returns_to_go(TOKEN_REWARDS, MASK),
        returns_to_go(TOKEN_REWARDS, MASK, gamma=1.0),
    )


def test_reinforce_plus_plus_whitens_the_returns():
    for gamma in (1.0, 0.9):
        got = reinforce_plus_plus_advantages(TOKEN_REWARDS, MASK, gamma=gamma)
        np.testing.assert_allclose(got, whitened(returns(gamma)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        reinforce_plus_plus_advantages(TOKEN_REWARDS, MASK),
        reinforce_plus_plus_advantages(TOKEN_REWARDS, MASK, gamma=1.0),
    )


def test_the_baseline_variant_takes_off_the_mean_of_the_group():
    for rewards, ids, centered in [
        ([1.0, 3.0, 7.0, np.nan], [0, 0, 1, 1], [-1.0, 1.0, 0.0, 0.0]),
        ([1.0, 3.0, 8.0, np.nan], [0, 0, 0, 0], [-3.0, -1.0, 4.0, 0.0]),
    ]:
        args = np.float32(rewards), np.int32(ids), MASK
        want = whitened(np.array(centered)[:, None] * np.ones(MASK.shape))
        got = reinforce_plus_plus_baseline_advantages(*args)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_groups_of_different_spread_keep_it():
    mask = np.ones((4, 2), bool)
    rewards, ids = np.float32([1.0, 3.0, 0.0, 20.0]), np.int32([0, 0, 1, 1])
    got = reinforce_plus_plus_baseline_advantages(rewards, ids, mask)
    np.testing.assert_allclose(got[3], 10 * got[1], rtol=1e-5)


def test_remax_takes_off_the_greedy_reward():
    got = remax_advantages(np.float32([1.0, 2.0]), np.float32([0.5, 3.0]))
    np.testing.assert_array_equal(got, [0.5, -1.0])


def test_a_mask_without_time_is_refused():
    rewards, mask = np.zeros(4, np.float32), np.ones(4, bool)
    with pytest.raises(AssertionError):
        reinforce_plus_plus_baseline_advantages(rewards, np.zeros(4, int), mask)
