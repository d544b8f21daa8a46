"""Tests for jalign/losses/ppo.py."""

import itertools

import jax
import numpy as np
import pytest

from jalign.losses import approx_kl, clip_frac, ppo_policy_loss, ppo_value_loss
from tests.losses.oracle import assert_matches

# Ratios below, inside and above the clip range, with either sign of the advantage.
RATIOS = np.array([[0.5, 0.9, 1.05, 1.25, 2.0]] * 2)
OLD_LOGPS = np.float32(-np.arange(1, 11).reshape(2, 5) / 3)
LOGPS = np.float32(OLD_LOGPS + np.log(RATIOS))
ADVANTAGES = np.float32([[1.0] * 5, [-2.0] * 5])


@pytest.mark.parametrize("high", [None, 0.28])
def test_policy_loss_matches_float64_closed_form(high):
    def oracle(logps, old, adv):
        ratio = np.exp(logps - old)
        clipped = np.clip(ratio, 0.8, 1.2 if high is None else 1 + high)
        return -np.minimum(ratio * adv, clipped * adv)

    assert_matches(
        lambda *x: ppo_policy_loss(*x, clip_eps=0.2, clip_eps_high=high),
        oracle,
        [LOGPS, OLD_LOGPS, ADVANTAGES],
        argnums=(0,),
    )


def test_dual_clip_bounds_the_loss_of_negative_advantages():
    logps = np.float32(OLD_LOGPS + np.log([[0.5, 1.0, 1.25, 2.0, 4.0]] * 2))

    def oracle(logps, old, adv):
        ratio = np.exp(logps - old)
        objective = np.minimum(ratio * adv, np.clip(ratio, 0.8, 1.28) * adv)
        return -np.where(adv < 0, np.maximum(objective, 3.0 * adv), objective)

    options = {"clip_eps": 0.2, "clip_eps_high": 0.28, "dual_clip": 3.0}
    loss = lambda *x: ppo_policy_loss(*x, **options)  # noqa: E731
    assert_matches(loss, oracle, [logps, OLD_LOGPS, ADVANTAGES], argnums=(0,))
    grad = jax.grad(lambda x: loss(x, OLD_LOGPS, ADVANTAGES).sum())(logps)
    want = [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    np.testing.assert_array_equal(np.asarray(grad) != 0, want)


def test_gradient_is_zero_exactly_where_clipped():
    args = LOGPS, OLD_LOGPS, ADVANTAGES
    grad = jax.grad(lambda *x: ppo_policy_loss(*x, clip_eps=0.2).sum())(*args)
    want = [[0, 0, 0, 1, 1], [1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(clip_frac(*args, clip_eps=0.2), want)
    np.testing.assert_array_equal(np.asarray(grad) == 0, want)


def test_at_the_old_policy_it_is_the_policy_gradient():
    value, grad = jax.value_and_grad(
        lambda x: ppo_policy_loss(x, OLD_LOGPS, ADVANTAGES, clip_eps=0.2).sum()
    )(OLD_LOGPS)
    np.testing.assert_allclose(value, -ADVANTAGES.sum())
    np.testing.assert_allclose(grad, -ADVANTAGES)


@pytest.mark.parametrize(
    ("d", "advantage"),
    itertools.product([0.0, 1.0, 50.0, 100.0, 1e3, -1e3], [-1.0, 0.0, 1.0]),
)
def test_ratios_far_away_have_finite_losses_and_gradients(d, advantage):
    logps, old, adv = (np.full((1, 1), x, "f4") for x in (d, 0.0, advantage))
    value, grad = jax.value_and_grad(
        lambda x: ppo_policy_loss(x, old, adv, clip_eps=0.2).sum()
    )(logps)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_value_loss_matches_float64_closed_form():
    old = np.float32([[0.0, 0.0, 0.0, 0.0, 1.0]])
    values = np.float32([[0.1, 0.5, 0.5, -0.5, 1.1]])
    returns = np.float32([[1.0, 1.0, -1.0, 1.0, 1.02]])

    def oracle(v, old, target):
        clipped = np.clip(v, old - 0.2, old + 0.2)
        return np.maximum((v - target) ** 2, (clipped - target) ** 2) / 2

    assert_matches(
        lambda *x: ppo_value_loss(*x, clip_eps=0.2),
        oracle,
        [values, old, returns],
        argnums=(0,),
    )


def test_value_loss_without_clip_is_half_the_squared_error():
    values, returns = np.float32([[3.0, -4.0]]), np.float32([[1.0, 2.0]])
    loss = ppo_value_loss(values, 0 * values, returns, clip_eps=np.inf)
    np.testing.assert_array_equal(loss, [[2.0, 18.0]])


def test_approx_kl_matches_closed_form_without_gradient():
    arrays = [LOGPS, OLD_LOGPS]
    assert_matches(approx_kl, lambda a, b: (a - b) ** 2 / 2, arrays, argnums=())
