"""Tests for XPO (preference.py) and Nash-MD (policy.py)."""

import functools

import jax
import numpy as np

from jalign import losses
from tests.losses.pairs import BETA, LOGPS, assert_all_match, logistic

partial = functools.partial


def xpo(c, r, ref_c, ref_r, explore, alpha=1e-5):
    return logistic(BETA * (c - ref_c - r + ref_r)) + alpha * explore


def test_xpo_matches_float64_closed_form():
    cases = [
        (partial(losses.xpo_loss, beta=BETA), xpo),
        (partial(losses.xpo_loss, beta=BETA, alpha=0.3), partial(xpo, alpha=0.3)),
    ]
    assert_all_match(cases, [*LOGPS, LOGPS[1] - 1], argnums=(0, 1, 4))


def test_nash_md_has_the_value_and_the_gradient_of_its_bracket():
    wins = np.float32([0.0, 1.0, 0.3, 0.5, 0.9, 0.7])
    logps, ref_logps = LOGPS[[0, 2]]
    bracket = wins - 0.5 - BETA * (logps - ref_logps).astype("f8")

    def loss(*x):
        return losses.nash_md_loss(*x, beta=BETA)

    np.testing.assert_allclose(
        loss(logps, ref_logps, wins), -bracket * logps, rtol=1e-5
    )
    grads = jax.grad(lambda *x: loss(*x).sum(), (0, 1, 2))(logps, ref_logps, wins)
    np.testing.assert_allclose(grads[0], -bracket, rtol=1e-5)
    assert not np.any(grads[1:])


def test_nash_md_ascends_the_regularised_win_rate():
    """Summed over all y, weighted by π(y), it is the exact policy gradient."""
    rng = np.random.default_rng(0)
    theta, ref = rng.normal(size=(2, 5))
    wins = rng.random(5)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum())

    def objective(x):  # win rate - β KL(π‖π_ref)
        log_p = log_softmax(x)
        p = np.exp(log_p)
        return (p * (wins - BETA * (log_p - log_softmax(ref)))).sum()

    eye = np.eye(5) * 1e-6
    want = [(objective(theta + e) - objective(theta - e)) / 2e-6 for e in eye]

    def loss(x):
        log_p = jax.nn.log_softmax(x)
        ref_logps, w = (np.float32(v) for v in (log_softmax(ref), wins))
        each = losses.nash_md_loss(log_p, ref_logps, w, beta=BETA)
        return (jax.lax.stop_gradient(jax.numpy.exp(log_p)) * each).sum()

    got = jax.grad(loss)(theta.astype(np.float32))
    np.testing.assert_allclose(-got, want, rtol=1e-3, atol=1e-5)
