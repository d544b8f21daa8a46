"""Tests for jalign/losses/kto.py."""

import jax
import numpy as np

from jalign.losses import bco_loss, bco_shift_update
from tests.losses.oracle import assert_matches
from tests.losses.pairs import BETA, LOGPS, log_sigmoid

ROWS = LOGPS[[0, 2]]
DESIRABLE = np.array([1, 1, 0, 0, 1, 0], bool)


def oracle(logps, ref_logps):
    z = BETA * (logps - ref_logps) - 0.4
    return np.where(DESIRABLE, -log_sigmoid(z), -log_sigmoid(-z))


def test_matches_float64_closed_form():
    def loss(a, b, shift=0.4):
        return bco_loss(a, b, DESIRABLE, beta=BETA, shift=shift)

    assert_matches(loss, oracle, ROWS, argnums=(0,))
    assert jax.grad(lambda s: loss(*ROWS, s).sum())(0.4) == 0


def test_the_shift_is_the_mean_of_all_rewards_seen():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(5, 6)).astype(np.float32)
    mask = rng.random((5, 6)) < 0.7
    mask[3] = False
    state, update = (0.0, 0.0), jax.jit(bco_shift_update)
    for i, (batch, counted) in enumerate(zip(rewards, mask, strict=True)):
        state = update(*state, np.where(counted, batch, np.nan), counted)
        seen = rewards[: i + 1][mask[: i + 1]].astype("f8")
        np.testing.assert_allclose(state, (seen.mean(), seen.size), rtol=1e-5)


def test_of_one_reward_the_shift_is_that_reward():
    state = bco_shift_update(0.0, 0.0, np.float32([3.0]), np.ones(1, bool))
    assert state == (3.0, 1.0)


def test_a_long_run_neither_stops_nor_overflows():
    one = np.ones(2, np.float32)
    shift, count = bco_shift_update(0.0, 2.0**24, one, one > 0)
    assert count == 2**24
    np.testing.assert_allclose(shift, 2 / 2**24, rtol=1e-6)
