"""Tests for jalign/losses/sequence_policy.py."""

import jax
import numpy as np

from jalign.losses import (
    gmpo_loss,
    gspo_loss,
    gspo_token_loss,
    sequence_mean,
    vespo_loss,
)
from tests.losses.oracle import assert_matches

RNG = np.random.default_rng(0)
MASK = np.array(
    [
        [1, 1, 1, 1],  # A > 0, inside the clip
        [0, 1, 1, 0],  # A > 0, above
        [1, 0, 1, 1],  # A > 0, below
        [1, 1, 1, 0],  # A < 0, above
        [0, 0, 1, 1],  # A < 0, below
        [1, 1, 0, 0],  # A = 0
        [0, 0, 0, 0],  # filler
    ],
    bool,
)
OLD_LOGPS = np.float32(-1 - RNG.random(MASK.shape))
SHIFT = np.array([0.1, 0.7, -0.6, 0.8, -0.7, 0.3, 0.5])
LOGPS = np.float32(OLD_LOGPS + SHIFT[:, None] + 0.2 * RNG.normal(size=MASK.shape))
SIGNS = np.array([1.0, 2.0, 1.0, -1.5, -1.0, 0.0, 1.0])
ADVANTAGES = np.float32(np.broadcast_to(SIGNS[:, None], MASK.shape))
ARRAYS = [LOGPS, OLD_LOGPS, ADVANTAGES]
LENGTHS = np.maximum(MASK.sum(1, keepdims=True), 1)


def mean(x):
    return (x * MASK).sum(1, keepdims=True) / LENGTHS


def clipped(ratio, adv, low=0.2, high=0.28):
    return -np.minimum(ratio * adv, np.clip(ratio, 1 - low, 1 + high) * adv)


def gspo_oracle(logps, old, adv):
    return MASK * clipped(np.exp(mean(logps - old)), adv)


def with_mask(function, **options):
    return lambda *arrays: function(*arrays, MASK, **options)


GSPO = with_mask(gspo_loss, clip_eps=0.2, clip_eps_high=0.28)
GSPO_TOKEN = with_mask(gspo_token_loss, clip_eps=0.2, clip_eps_high=0.28)


def test_gspo_matches_float64_closed_form():
    assert_matches(GSPO, gspo_oracle, ARRAYS, (0,))


def test_gspo_token_matches_float64_closed_form_with_frozen_ratio():
    frozen = np.exp(mean(LOGPS.astype("f8") - OLD_LOGPS))
    adv = ADVANTAGES + np.float32([0.0, 0.1, 0.2, 0.3])  # differs along a row

    def oracle(logps, old, adv):
        return MASK * clipped(frozen * np.exp(logps - LOGPS), adv)

    assert_matches(GSPO_TOKEN, oracle, [LOGPS, OLD_LOGPS, adv], (0,))


def test_both_gspos_have_the_same_sequence_mean_and_gradient():
    def both(function):
        def total(x):
            return sequence_mean(function(x, OLD_LOGPS, ADVANTAGES), MASK)[0]

        return jax.jit(jax.value_and_grad(total))(LOGPS)

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, both(GSPO), both(GSPO_TOKEN))


def test_gmpo_matches_float64_closed_form():
    def oracle(logps, old, adv):
        d = logps - old
        d = np.where(adv > 0, np.minimum(d, 0.3), np.maximum(d, -0.4))
        return MASK * -np.exp(mean(d)) * adv

    function = with_mask(gmpo_loss, clip_eps=0.4, clip_eps_high=0.3)
    assert_matches(function, oracle, ARRAYS, (0,))


def test_gmpo_has_one_clip_range_by_default():
    wide = with_mask(gmpo_loss, clip_eps=0.4, clip_eps_high=0.4)
    np.testing.assert_array_equal(with_mask(gmpo_loss)(*ARRAYS), wide(*ARRAYS))


def test_vespo_matches_float64_closed_form_with_frozen_weights():
    log_w = ((LOGPS.astype("f8") - OLD_LOGPS) * MASK).sum(1, keepdims=True)
    k = np.where(ADVANTAGES >= 0, 2.0, 3.0)
    lam = np.where(ADVANTAGES >= 0, 3.0, 2.0)
    phi = np.exp(lam * (1 - np.exp(log_w)) + k * log_w)

    def oracle(logps, old, adv):
        return MASK * -phi * adv * logps

    assert_matches(with_mask(vespo_loss), oracle, ARRAYS, (0,))


def test_nothing_but_zero_stands_at_places_that_do_not_count():
    dirty = [np.where(MASK, x, np.nan).astype("f4") for x in ARRAYS]
    clipped = {"clip_eps": 0.2}
    for function, options in [
        (gspo_loss, clipped),
        (gspo_token_loss, clipped),
        (gmpo_loss, clipped),
        (vespo_loss, {}),
    ]:
        got = function(*dirty, MASK, **options)
        want = MASK * np.asarray(function(*ARRAYS, MASK, **options))
        np.testing.assert_array_equal(got, want)


def test_vespo_weights_fade_out_but_are_held_far_below():
    ones, mask = np.ones((2, 2), "f4"), np.ones((2, 2), bool)
    shift = np.float32([[5.0, 5.0], [-30.0, -30.0]])
    weights = -jax.grad(lambda x: vespo_loss(x, -ones, ones, mask).sum())(shift - ones)
    np.testing.assert_allclose(weights, [[0, 0], [np.exp(3) * 1e-16] * 2], rtol=1e-4)
