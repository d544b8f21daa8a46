"""Tests for jalign/losses/policy.py."""

import numpy as np

from jalign.losses import rloo_loss
from tests.losses.oracle import assert_matches


def clipped(ratio, adv, high=0.28):
    return -np.minimum(ratio * adv, np.clip(ratio, 0.8, 1 + high) * adv)


def test_rloo_matches_float64_closed_form():
    old = np.float32([-20.0, -30.0, -25.0, -22.0, -21.0])
    logps = np.float32(old + [0.1, 0.5, -0.5, 0.6, -0.7])
    adv = np.float32([1.0, 2.0, 1.0, -1.5, -1.0])

    def oracle(logps, old, adv):
        return clipped(np.exp(logps - old), adv)

    function = lambda *x: rloo_loss(*x, clip_eps=0.2, clip_eps_high=0.28)  # noqa: E731
    assert_matches(function, oracle, [logps, old, adv], (0,))
    got = rloo_loss(logps, old, adv, clip_eps=0.2)
    ratio = np.exp(logps.astype("f8") - old)
    np.testing.assert_allclose(got, clipped(ratio, adv, 0.2), rtol=1e-5)
