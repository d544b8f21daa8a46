"""Tests for jalign/losses/reward.py."""

import jax
import numpy as np
import pytest

from jalign.losses import (
    attribute_regression_loss,
    bradley_terry_loss,
    cross_entropy,
    process_reward_loss,
    reward_center_loss,
    sequence_mean,
)
from tests.losses.oracle import assert_matches

REWARDS = np.array([[0.5, 3.0, -90.0, 2.0], [0.5, -1.0, 90.0, 2.5]], np.float32)


@pytest.mark.parametrize("margin", [0.0, 0.7, np.float32([0, 1, 2, 3])])
def test_matches_float64_closed_form(margin):
    assert_matches(
        lambda c, r: bradley_terry_loss(c, r, margin=margin),
        lambda c, r: np.logaddexp(0, -(c - r - margin)),
        REWARDS,
        argnums=(0, 1),
    )


def test_center_loss_matches_float64_closed_form():
    rewards = REWARDS[:, [1, 3]]
    assert_matches(reward_center_loss, lambda c, r: (c + r) ** 2, rewards, (0, 1))


@pytest.mark.parametrize("difference", [0, 20, 90, 1e4, 1e6])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_differences_have_exact_values_and_gradients(difference, sign):
    x = np.float32([sign * difference])
    loss, grad = jax.value_and_grad(lambda c: bradley_terry_loss(c, 0 * x).sum())(x)
    want = np.logaddexp(0, -np.float64(x[0]))
    np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-30)
    want_grad = -np.exp(-np.logaddexp(0, np.float64(x[0])))
    np.testing.assert_allclose(grad, [want_grad], rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(
    "bad", [np.float32([1.0]), np.float64([0] * 4), np.ones((4, 1), "f4")]
)
def test_rejects_a_margin_of_another_shape_or_dtype(bad):
    with pytest.raises(AssertionError):
        bradley_terry_loss(*REWARDS, margin=bad)


def test_attribute_regression_matches_float64_closed_form():
    scores, ratings = np.float32([[[1, 2], [3.5, -1]], [[0, 4], [2, -1.5]]])
    assert_matches(
        attribute_regression_loss, lambda s, r: (s - r) ** 2, [scores, ratings], (0,)
    )


def test_attributes_that_were_not_rated_do_not_count():
    scores, ratings = np.float32([[[1, 2, 3]], [[0, np.nan, 1]]])
    loss = attribute_regression_loss(scores, ratings)
    total, rows = sequence_mean(loss, ~np.isnan(ratings))
    assert (total, rows) == ((1 + 4) / 2, 1)


def test_process_reward_loss_matches_float64_closed_form():
    logits = np.float32([[0.5, -3, 30], [2, -200, 90]])
    labels = np.float32([[1, 0, 0.5], [0.25, 1, 0]])
    assert_matches(
        process_reward_loss,
        lambda z, y: y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z),
        [logits, labels],
        argnums=(0,),
    )


def test_process_reward_of_two_outputs_is_their_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    labels = np.int32([[0, 1, 1], [1, 0, 1]])
    got = process_reward_loss(logits[..., 1] - logits[..., 0], labels.astype("f4"))
    np.testing.assert_allclose(got, cross_entropy(logits, labels), rtol=1e-5)
