"""Tests for jalign/losses/preference.py, and of what all losses of pairs share."""

import functools

import jax
import numpy as np
import pytest

from jalign import losses
from tests.losses.pairs import BETA, EPS, LOGPS, assert_all_match, log_sigmoid, sigmoid

partial = functools.partial


def margin(c, r, ref_c, ref_r):
    return (c - ref_c) - (r - ref_r)


def hinge(*x):
    return np.maximum(0, 1 - BETA * margin(*x))


def ipo(*x):
    return (margin(*x) - 1 / (2 * BETA)) ** 2


def robust(*x):
    z = BETA * margin(*x)
    return (-(1 - EPS) * log_sigmoid(z) + EPS * log_sigmoid(-z)) / (1 - 2 * EPS)


def exo(*x):
    z = BETA * margin(*x)
    return sigmoid(z) * (log_sigmoid(z) - np.log(1 - EPS)) + sigmoid(-z) * (
        log_sigmoid(-z) - np.log(EPS)
    )


def discopop(*x, tau=0.7):
    z = BETA * margin(*x)
    m = sigmoid(z / tau)
    return (1 - m) * -log_sigmoid(z) + m * np.exp(-z)


def test_losses_of_the_margin_match_float64_closed_forms():
    smoothing = {"beta": BETA, "label_smoothing": EPS}
    cases = [
        (partial(losses.hinge_loss, beta=BETA), hinge),
        (partial(losses.ipo_loss, beta=BETA), ipo),
        (partial(losses.robust_dpo_loss, **smoothing), robust),
        (partial(losses.exo_pair_loss, **smoothing), exo),
        (partial(losses.discopop_loss, beta=BETA, tau=0.7), discopop),
    ]
    assert_all_match(cases, LOGPS)


def test_without_a_reference_any_scores_may_be_compared():
    ratios = LOGPS[:2] - LOGPS[2:]
    for name in ("dpo", "hinge", "ipo", "exo_pair", "discopop"):
        loss = partial(getattr(losses, f"{name}_loss"), beta=BETA)
        got = loss(*ratios, None, None)
        np.testing.assert_allclose(got, loss(*LOGPS), rtol=1e-6, err_msg=name)
        with pytest.raises(AssertionError):
            loss(*LOGPS[:3], None)


def test_defaults_are_those_of_the_field():
    assert_all_match(
        [
            (
                lambda *x: losses.exo_pair_loss(*x, beta=BETA),
                lambda *x: exo_with(1e-3, *x),
            ),
            (
                lambda *x: losses.discopop_loss(*x, beta=BETA),
                partial(discopop, tau=0.05),
            ),
        ],
        LOGPS[:, :5],
    )


def exo_with(eps, *x):
    z = BETA * margin(*x)
    p, q = (1 - eps, eps), (sigmoid(z), sigmoid(-z))
    return sum(b * (np.log(b) - np.log(a)) for a, b in zip(p, q, strict=True))


def test_robust_dpo_averages_to_dpo_on_the_true_labels():
    c, r, ref_c, ref_r = LOGPS[:, :5]
    loss = partial(losses.robust_dpo_loss, beta=BETA, label_smoothing=EPS)
    mean = (1 - EPS) * loss(c, r, ref_c, ref_r) + EPS * loss(r, c, ref_r, ref_c)
    want = losses.dpo_loss(c, r, ref_c, ref_r, beta=BETA)
    np.testing.assert_allclose(mean, want, rtol=1e-5)


def test_discopop_of_a_hopeless_pair_is_its_margin_and_not_nan():
    def loss(x):
        return losses.discopop_loss(x, 0 * x, None, None, beta=1.0)[0]

    value, grad = jax.value_and_grad(loss)(np.float32([-1e4]))
    np.testing.assert_allclose([value, grad[0]], [1e4, -1.0], rtol=1e-6)
