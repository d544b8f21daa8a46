"""Tests for jalign/losses/advantages.py."""

import numpy as np
import pytest

from jalign.losses import adaptive_kl_update, gae, kl_shaped_rewards

RNG = np.random.default_rng(0)
REWARDS, VALUES = RNG.normal(size=(2, 4, 7)).astype(np.float32)
MASK = np.array(
    [[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0], [0] * 7],
    bool,
)  # all of a row; a completion; a gap, as a tool's answer makes; nothing


def gae_of_row(rewards, values, gamma, lam):
    """Σ_l (γλ)^l δ_{t+l}, written out, in float64."""
    values = np.append(np.asarray(values, np.float64), 0.0)
    deltas = np.asarray(rewards, np.float64) + gamma * values[1:] - values[:-1]
    n = len(deltas)
    return np.array(
        [
            sum((gamma * lam) ** (i - t) * deltas[i] for i in range(t, n))
            for t in range(n)
        ]
    )


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0, 1)]
)
def test_gae_of_the_counted_tokens_is_the_explicit_sum(gamma, lam):
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, gae_lambda=lam)
    for row in range(len(MASK)):
        counted = MASK[row]
        want = gae_of_row(REWARDS[row, counted], VALUES[row, counted], gamma, lam)
        np.testing.assert_allclose(advantages[row, counted], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            returns[row, counted], want + VALUES[row, counted], rtol=1e-5, atol=1e-5
        )
        assert not np.any(advantages[row, ~counted])
        assert not np.any(returns[row, ~counted])


def test_with_gamma_and_lambda_1_returns_are_the_rewards_to_come():
    mask = np.ones_like(MASK)
    _, returns = gae(REWARDS, VALUES, mask, gamma=1.0, gae_lambda=1.0)
    want = np.cumsum(REWARDS[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, want, rtol=1e-5, atol=1e-5)


def test_kl_shaped_rewards_put_the_score_on_the_last_counted_token():
    scores = np.float32([1.0, 2.0, 3.0, np.nan])
    got = kl_shaped_rewards(scores, REWARDS, VALUES, MASK, beta=0.5)
    want = np.where(MASK, -0.5 * (REWARDS.astype("f8") - VALUES), 0.0)
    want[0, 6] += 1.0
    want[1, 3] += 2.0
    want[2, 5] += 3.0  # the row without a token keeps no score
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kl", "want"), [(6.0, 0.1), (6.6, 0.1 * 1.001), (60.0, 0.1 * 1.002), (0, 0.0998)]
)
def test_adaptive_kl_moves_by_at_most_a_fifth_per_horizon(kl, want):
    got = adaptive_kl_update(0.1, kl, target=6.0, horizon=10_000, num_samples=100)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_adaptive_kl_rejects_more_than_scalars():
    with pytest.raises(AssertionError):
        adaptive_kl_update(0.1, np.ones(2), target=6.0, horizon=1.0, num_samples=1)


def test_a_completion_may_be_one_token_long():
    scores, logps = np.float32([2.0, 3.0]), np.float32([[-1.0], [-2.0]])
    mask = np.array([[True], [False]])
    got = kl_shaped_rewards(scores, logps, logps - 1, mask, beta=0.5)
    np.testing.assert_array_equal(got, [[1.5], [0.0]])
    got = gae(got, logps, mask, gamma=0.9, gae_lambda=0.5)
    np.testing.assert_array_equal(got, [[[2.5], [0.0]], [[1.5], [0.0]]])
