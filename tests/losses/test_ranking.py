"""Tests for jalign/losses/reward.py."""

import itertools
import math

import numpy as np

from jalign.losses import bradley_terry_loss, pairwise_ranking_loss, plackett_luce_loss
from tests.losses.oracle import assert_matches

REWARDS = np.float32(
    [[2.0, 0.5, 1.0, -1.0], [0.3, 0.2, 9.0, 0.0], [90.0, -90.0, 0, 0], [1, 2, 3, 4]]
)
MASK = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 0]], bool)


def pairs(rewards):
    losses = []
    for row, mask in zip(rewards, MASK, strict=True):
        gaps = [a - b for a, b in itertools.combinations(row[mask], 2)]
        losses.append(np.mean(np.logaddexp(0, -np.array(gaps))) if gaps else 0.0)
    return np.array(losses)


def plackett_luce(rewards):
    losses = []
    for row, mask in zip(rewards, MASK, strict=True):
        left, loss = list(row[mask]), 0.0
        while left:
            loss += np.logaddexp.reduce(left) - left.pop(0)
        losses.append(loss)
    return np.array(losses)


def test_both_match_float64_closed_forms():
    for function, oracle in (
        (pairwise_ranking_loss, pairs),
        (plackett_luce_loss, plackett_luce),
    ):
        assert_matches(
            lambda x, f=function: f(x, MASK), oracle, [REWARDS], argnums=(0,)
        )


def test_of_two_completions_both_are_bradley_terry():
    two = REWARDS[:, :2]
    want = bradley_terry_loss(two[:, 0], two[:, 1])
    for function in (pairwise_ranking_loss, plackett_luce_loss):
        got = function(two, np.ones((4, 2), bool))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)


def test_equal_rewards_make_all_rankings_equally_likely():
    ones = np.ones((1, 6), np.float32)
    mask = np.ones((1, 6), bool)
    want = math.log(math.factorial(6))
    np.testing.assert_allclose(plackett_luce_loss(ones, mask), [want], rtol=1e-6)
    np.testing.assert_allclose(
        pairwise_ranking_loss(ones, mask), [np.log(2)], rtol=1e-6
    )
