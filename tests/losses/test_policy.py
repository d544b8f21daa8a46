"""Tests for jalign/losses/policy.py."""

import jax
import numpy as np

from jalign.losses import apa_loss, cispo_loss, reinforce_loss, sapo_loss
from tests.losses.oracle import assert_matches

RATIOS = np.array([[0.3, 0.9, 1.05, 1.25, 4.0]] * 2)
OLD_LOGPS = np.float32(-np.arange(1, 11).reshape(2, 5) / 3)
LOGPS = np.float32(OLD_LOGPS + np.log(RATIOS))
ADVANTAGES = np.float32([[1.0] * 5, [-2.0] * 5])
ARRAYS = [LOGPS, OLD_LOGPS, ADVANTAGES]


def test_reinforce_matches_float64_closed_form():
    assert_matches(reinforce_loss, lambda x, a: -a * x, [LOGPS, ADVANTAGES], (0,))


def test_cispo_matches_float64_closed_form_with_frozen_weights():
    ratio = np.exp(LOGPS.astype("f8") - OLD_LOGPS)
    for low, high, weights in [
        (0.5, 3.0, np.clip(ratio, 0.5, 3.0)),
        (0.0, np.inf, ratio),
    ]:
        assert_matches(
            lambda *x, b=(low, high): cispo_loss(*x, min_ratio=b[0], max_ratio=b[1]),
            lambda logps, old, adv, w=weights: -w * adv * logps,
            ARRAYS,
            (0,),
        )


def test_a_clipped_token_keeps_its_gradient_in_cispo():
    grad = jax.grad(lambda x: cispo_loss(x, *ARRAYS[1:], max_ratio=3.0).sum())(LOGPS)
    np.testing.assert_allclose(grad[:, -1], -3.0 * ADVANTAGES[:, -1], rtol=1e-6)


def test_sapo_matches_float64_closed_form():
    arrays = [*ARRAYS[:2], ADVANTAGES.copy()]
    arrays[2][1, 2] = 0.0  # neither sign: the loss is 0 with either temperature

    def oracle(logps, old, adv):
        tau = np.where(adv > 0, 1.3, 2.1)
        return -4 / tau / (1 + np.exp(-tau * (np.exp(logps - old) - 1))) * adv

    assert_matches(
        lambda *x: sapo_loss(*x, temperature_pos=1.3, temperature_neg=2.1),
        oracle,
        arrays,
        (0,),
    )


def test_sapo_starts_as_the_policy_gradient():
    loss = lambda x: sapo_loss(x, OLD_LOGPS, ADVANTAGES).sum()  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(OLD_LOGPS), -ADVANTAGES, rtol=1e-6)


def test_apa_matches_float64_closed_form():
    assert_matches(
        lambda *x: apa_loss(*x, beta=0.7),
        lambda logps, ref, adv: (logps - ref - adv / 0.7) ** 2,
        ARRAYS,
        (0,),
    )
