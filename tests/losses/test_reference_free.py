"""Tests for jalign/losses/reference_free.py."""

import functools

import jax
import numpy as np

from jalign import losses
from jalign.losses.reference_free import log1mexp
from tests.losses.pairs import BETA, EPS, LOGPS, assert_all_match, logistic

partial = functools.partial
# Averages over the tokens; the last column is nearly certain on both sides.
MEANS = np.float32(
    [
        [-1.0, -0.25, -3.0, -0.6931, -9.0, -1e-3],
        [-1.0, -2.5, -0.1, -0.7, -20.0, -2e-2],
        [-0.5, -1.0, -0.2, -4.0, -0.3, -1.0],
    ]
)


def odds(x):
    return np.exp(x) / (1 - np.exp(x))


def alphapo(c, r, alpha, gamma=0.5, eps=0.0):
    chosen, rejected = ((1 - np.exp(x) ** -alpha) / alpha for x in (c, r))
    return logistic(BETA * (chosen - rejected) - gamma, eps)


def tpo(c, r, gold, gamma=0.0, eps=0.0, alpha=1.0):
    return logistic(BETA * (c - r) - gamma, eps) - alpha * gold


def test_losses_of_means_match_float64_closed_forms():
    b, e = {"beta": BETA}, {"label_smoothing": EPS}
    cases = [
        (partial(losses.simpo_loss, **b), lambda c, r: logistic(BETA * (c - r) - 0.5)),
        (
            partial(losses.simpo_loss, **b, **e, gamma=0.9),
            lambda c, r: logistic(BETA * (c - r) - 0.9, EPS),
        ),
        (partial(losses.alphapo_loss, **b, alpha=0.25), partial(alphapo, alpha=0.25)),
        (
            partial(losses.alphapo_loss, **b, **e, alpha=-0.5, gamma=0.1),
            partial(alphapo, alpha=-0.5, gamma=0.1, eps=EPS),
        ),
        (
            partial(losses.alphapo_loss, **b, alpha=0.0),
            lambda c, r: logistic(BETA * (c - r) - 0.5),
        ),
        (losses.orpo_loss, lambda c, r: logistic(np.log(odds(c) / odds(r)))),
    ]
    # The odds of near certainty have a curvature that the differences see.
    assert_all_match(cases, MEANS[:2], rtol=2e-5)


def test_losses_of_sums_match_float64_closed_forms():
    b, e = {"beta": BETA}, {"label_smoothing": EPS}
    cases = [
        (partial(losses.cpo_loss, **b), lambda c, r: logistic(BETA * (c - r))),
        (
            partial(losses.cpo_loss, **b, **e),
            lambda c, r: logistic(BETA * (c - r), EPS),
        ),
    ]
    assert_all_match(cases, LOGPS[:2])


def test_tpo_matches_float64_closed_form():
    options = {"gamma": 0.5, "alpha": 0.7}
    cases = [
        (partial(losses.tpo_loss, beta=BETA), tpo),
        (
            partial(losses.tpo_loss, beta=BETA, label_smoothing=EPS, **options),
            partial(tpo, eps=EPS, **options),
        ),
    ]
    assert_all_match(cases, MEANS, argnums=(0, 1, 2))


def test_reference_free_dpo_is_cpo():
    got = losses.dpo_loss(*LOGPS[:2], None, None, beta=BETA, label_smoothing=EPS)
    want = losses.cpo_loss(*LOGPS[:2], beta=BETA, label_smoothing=EPS)
    np.testing.assert_array_equal(got, want)


def test_orpo_is_finite_where_a_completion_is_certain():
    def loss(c, r):
        return losses.orpo_loss(c, r).sum()

    certain, likely = np.float32([0.0, -1e-9, -1e-3]), np.float32([-1.0] * 3)
    value, grad = jax.value_and_grad(loss)(certain, likely)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    got = losses.orpo_loss(likely, certain)
    log_odds = [np.log(odds(np.float64(x))) for x in (-1.0, -1e-6, -1e-3)]
    want = np.logaddexp(
        0, [log_odds[1] - log_odds[0]] * 2 + [log_odds[2] - log_odds[0]]
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_log1mexp_is_exact_at_both_ends():
    x = -np.float32([0, 1e-9, 1e-6, 1e-3, 0.1, 0.5, 0.69, 0.7, 1, 2, 5, 10, 15])
    held = np.minimum(x, np.float32(-1e-6)).astype("f8")
    want = np.log1p(-np.exp(held))
    want[held > -0.1] = np.log(-np.expm1(held[held > -0.1]))
    got, grad = jax.vmap(jax.value_and_grad(log1mexp))(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    slope = np.where(x < -1e-6, 1 / np.expm1(-np.minimum(x, -1e-6).astype("f8")), 0)
    np.testing.assert_allclose(grad[3:], -slope[3:], rtol=1e-5)
    assert np.all(np.isfinite(grad))


def test_alphapo_stops_its_exponent_at_40():
    x = np.float32([-100.0, -1e4])
    got = losses.alphapo_loss(x, 0 * x, beta=1.0, alpha=1.0, gamma=0.0)
    np.testing.assert_allclose(got, [np.expm1(40.0)] * 2, rtol=1e-5)
