"""Tests for jalign/losses/aot.py."""

import functools

import numpy as np

from jalign import losses
from tests.losses.oracle import assert_matches
from tests.losses.pairs import BETA, EPS, LOGPS, SIDES, logistic

partial = functools.partial
SCALARS = {"beta": BETA, "label_smoothing": EPS}
MASK = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
RNG = np.random.default_rng(0)
ROWS = (-30 * RNG.random((4, 8))).astype(np.float32)


def quantile_losses(x, y):
    """In row i the loss of x_i against the y of its rank, counted rows only."""
    out = np.zeros_like(x)
    kept = np.flatnonzero(MASK)
    best = sorted(kept, key=lambda i: x[i])
    for i, other in zip(best, sorted(y[kept]), strict=True):
        out[i] = logistic(BETA * (x[i] - other), EPS)
    return out


def paired(c, r, ref_c, ref_r):
    return quantile_losses(c - r, ref_c - ref_r)


def unpaired(c, r, ref_c, ref_r):
    return quantile_losses(c - ref_c, r - ref_r)


def test_both_match_float64_closed_forms():
    for function, oracle in (
        (losses.aot_loss, paired),
        (losses.aot_unpaired_loss, unpaired),
    ):
        assert_matches(
            lambda *x, f=function: f(*x, MASK, **SCALARS), oracle, ROWS, SIDES
        )


def test_smoothing_is_off_by_default():
    for function in (losses.aot_loss, losses.aot_unpaired_loss):
        got = function(*ROWS, MASK, beta=BETA)
        want = function(*ROWS, MASK, beta=BETA, label_smoothing=0.0)
        np.testing.assert_array_equal(got, want)


def test_of_one_pair_there_is_nothing_to_sort():
    for i in range(LOGPS.shape[1]):
        pair, mask = LOGPS[:, i : i + 1], np.ones(1, bool)
        want = losses.dpo_loss(*pair, **SCALARS)
        for function in (losses.aot_loss, losses.aot_unpaired_loss):
            got = function(*pair, mask, **SCALARS)
            np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_parts_of_a_batch_do_not_add_up_to_its_loss():
    """TRL sorts each device's micro-batch: another number (test_golden_preference)."""
    mask = np.ones(8, bool)
    for function in (losses.aot_loss, losses.aot_unpaired_loss):
        whole = function(*ROWS, mask, beta=BETA).mean()
        halves = [
            function(*ROWS[:, h], mask[h], beta=BETA).mean()
            for h in (slice(4), slice(4, 8))
        ]
        assert abs(whole - np.mean(halves)) > 0.05
