"""Tests for jalign/losses/distillation.py."""

import jax
import numpy as np
import pytest

from jalign.losses import forward_kl_from_logits, jsd_from_logits, kl_from_logits
from tests.losses.oracle import assert_matches, log_softmax

RNG = np.random.default_rng(0)
LOGITS, REF_LOGITS = (2 * RNG.normal(size=(2, 2, 3, 7))).astype(np.float32)
FUNCTIONS = [kl_from_logits, forward_kl_from_logits, jsd_from_logits]


def kl(p, q):
    """Σ p (log p - log q) of two log-distributions, written out, in float64."""
    return (np.exp(p) * (p - q)).sum(-1)


def jsd(p, q, beta):
    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q)
    m = np.log(beta * np.exp(q) + (1 - beta) * np.exp(p))
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def oracle(formula, temperature=1.0):
    return lambda x, y: formula(*(log_softmax(z / temperature) for z in (x, y)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kls_match_float64_closed_form(temperature):
    for function, formula in [
        (kl_from_logits, kl),
        (forward_kl_from_logits, lambda p, q: kl(q, p)),
    ]:
        assert_matches(
            lambda *x, f=function: f(*x, temperature=temperature),
            oracle(formula, temperature),
            [LOGITS, REF_LOGITS],
            (0,),
        )


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_jsd_matches_float64_closed_form_and_ends_in_the_two_kls(beta):
    assert_matches(
        lambda *x: jsd_from_logits(*x, beta=beta, temperature=0.7),
        oracle(lambda p, q: jsd(p, q, beta), 0.7),
        [LOGITS, REF_LOGITS],
        (0,),
    )


def test_a_sweep_over_beta_includes_both_ends():
    def loss(logits, beta):
        return jsd_from_logits(logits, REF_LOGITS, beta=beta).sum()

    betas = np.float32([0.0, 0.3, 1.0])
    sweep = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(LOGITS, betas)
    for i, beta in enumerate(betas):
        value, grad = jax.value_and_grad(loss)(LOGITS, float(beta))
        np.testing.assert_allclose(sweep[0][i], value, rtol=1e-5)
        np.testing.assert_allclose(sweep[1][i], grad, rtol=1e-5, atol=1e-6)


def test_half_is_the_symmetric_divergence_by_default():
    got = jsd_from_logits(LOGITS, REF_LOGITS)
    np.testing.assert_allclose(got, jsd_from_logits(REF_LOGITS, LOGITS), rtol=1e-5)
    np.testing.assert_allclose(
        got,
        oracle(lambda p, q: jsd(p, q, 0.5))(
            LOGITS.astype("f8"), REF_LOGITS.astype("f8")
        ),
        rtol=1e-5,
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_impossible_tokens_and_equal_distributions(function):
    impossible = np.float32([[0, -np.inf, 1, -np.inf], [0, -np.inf, 1, 1e4]])
    value, grad = jax.value_and_grad(lambda x: function(x, impossible).sum())(
        impossible + np.float32([[1.0]])
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(grad, np.zeros((2, 4)), atol=1e-6)
    cut = function(LOGITS, REF_LOGITS)
    wide = [
        np.pad(x, [(0, 0), (0, 0), (0, 2)], constant_values=-np.inf)
        for x in (LOGITS, REF_LOGITS)
    ]
    np.testing.assert_allclose(function(*wide), cut, rtol=1e-6)


def test_temperature_is_1_by_default():
    for function in FUNCTIONS:
        got = function(LOGITS, REF_LOGITS)
        want = function(LOGITS, REF_LOGITS, temperature=1.0)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_beta_has_no_gradient_at_the_ends_rather_than_nan(beta):
    grad = jax.grad(lambda b: jsd_from_logits(LOGITS, REF_LOGITS, beta=b).sum())(beta)
    assert grad == 0


def test_many_impossible_tokens_add_no_rounding_up():
    logits = np.full((1, 4096), -np.inf, np.float32)
    logits[0, 0] = 0.0
    for beta in (0.1, 0.4, 0.6, 0.8):
        got = jsd_from_logits(logits, logits, beta=beta)
        np.testing.assert_allclose(got, [0.0], atol=1e-6)
