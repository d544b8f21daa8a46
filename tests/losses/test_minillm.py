"""Tests for jalign/losses/distillation.py."""

import numpy as np

from jalign.losses import kl_k1, mean_returns_to_go, reverse_kl_rewards
from tests.losses.test_reinforce import MASK, TOKEN_REWARDS, returns


def test_rewards_are_the_teachers_advantage_over_the_student():
    student, teacher = np.float32([[-1.0, -2.0]]), np.float32([[-1.5, -0.5]])
    got = reverse_kl_rewards(student, teacher)
    np.testing.assert_array_equal(got, [[-0.5, 1.5]])
    np.testing.assert_array_equal(got, -kl_k1(student, teacher))


def test_returns_are_divided_by_what_is_left_of_the_completion():
    for gamma in (1.0, 0.9, 0.0):
        left = np.zeros(MASK.shape)
        for row, counted in enumerate(MASK):
            n = counted.sum()
            left[row, counted] = [sum(gamma**i for i in range(n - t)) for t in range(n)]
        got = mean_returns_to_go(TOKEN_REWARDS, MASK, gamma=gamma)
        want = np.divide(returns(gamma), left, where=MASK, out=np.zeros(MASK.shape))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        mean_returns_to_go(TOKEN_REWARDS, MASK),
        mean_returns_to_go(TOKEN_REWARDS, MASK, gamma=1.0),
    )
