"""Tests for jalign/losses/scores.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses
from jalign.losses.scores import power_transform
from tests.losses.pairs import BETA, LOGPS, assert_all_match, logistic

partial = functools.partial
X = np.float32([0.0, 0.01, -0.01, 3.0, -3.0, -8.0, 9.0])
PAIR = [X - 5, np.full_like(X, -5)]


def alpha(a):
    return lambda x, y: (np.exp((a - 1) * (x - y)) - 1) / (a - 1)


def test_scores_match_float64_closed_forms():
    cases = [
        (losses.reverse_kl_score, lambda x, y: x - y),
        (losses.forward_kl_score, lambda x, y: 1 - np.exp(-(x - y))),
        (losses.js_score, lambda x, y: np.log(2 / (1 + np.exp(-(x - y))))),
        (losses.alpha_score, alpha(0.5)),
        (partial(losses.alpha_score, alpha=0.0), alpha(0.0)),
        (partial(losses.alpha_score, alpha=1.3), alpha(1.3)),
        (partial(losses.alpha_score, alpha=1.0), lambda x, y: x - y),
    ]
    assert_all_match(cases, PAIR, argnums=(0,))


def test_alpha_0_is_the_forward_kl_and_alpha_near_1_goes_to_the_reverse():
    forward = losses.forward_kl_score(*PAIR)
    np.testing.assert_allclose(losses.alpha_score(*PAIR, alpha=0.0), forward, rtol=1e-6)
    near = losses.alpha_score(*PAIR, alpha=1.0 + 1e-4)
    np.testing.assert_allclose(near, PAIR[0] - PAIR[1], rtol=2e-3, atol=1e-6)


def test_the_limit_makes_no_nan_on_the_way():
    with jax.debug_nans(True):
        alpha = jnp.float32(1.0)
        jax.grad(lambda x: losses.alpha_score(x, PAIR[1], alpha=alpha).sum())(PAIR[0])


@pytest.mark.parametrize(
    "score", [losses.forward_kl_score, partial(losses.alpha_score, alpha=0.0)]
)
def test_exponents_stop_at_40_where_a_square_is_still_finite(score):
    zero = np.zeros(3, np.float32)
    x = np.float32([-39.5, -41.0, -1e4])
    got, vjp = jax.vjp(lambda x: score(x, zero), x)
    np.testing.assert_allclose(got, -np.expm1([39.5, 40, 40]), rtol=1e-5)
    (grad,) = vjp(np.ones(3, np.float32))
    np.testing.assert_allclose(grad, [np.exp(39.5), 0, 0], rtol=1e-5)
    assert np.all(np.isfinite(losses.ipo_loss(got, -got, None, None, beta=0.1)))


def test_a_loss_of_scores_is_the_loss_of_the_divergence():
    def js_dpo(c, r, ref_c, ref_r):
        chosen, rejected = losses.js_score(c, ref_c), losses.js_score(r, ref_r)
        return losses.dpo_loss(chosen, rejected, None, None, beta=BETA)

    def oracle(c, r, ref_c, ref_r):
        score = [-np.logaddexp(0, -(x - y)) for x, y in ((c, ref_c), (r, ref_r))]
        return logistic(BETA * (score[0] - score[1]))

    assert_all_match([(js_dpo, oracle)], LOGPS)


def test_only_powers_nearer_to_0_than_a_millionth_are_the_limit():
    log_u = np.float32([1e6, -1e6, 3.0])
    for power in (-2e-6, -1.5e-6, -1e-6, 1e-6, 1.5e-6, 2e-6):
        got = power_transform(log_u, power)
        want = np.expm1(power * log_u.astype("f8")) / power
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for power in (-9e-7, 0.0, 9e-7):
        np.testing.assert_array_equal(power_transform(log_u, power), log_u)
