"""Tests for jalign/losses/ratios.py."""

import jax
import numpy as np
import pytest

from jalign.losses import kl_k1, kl_k2, kl_k3
from tests.losses.oracle import assert_matches

LOGPS = np.float32([[-1.0, -2.5, -0.1], [-4.0, -0.7, -3.0]])
REF_LOGPS = np.float32([[-1.5, -2.0, -0.2], [-1.0, -0.9, -3.0]])


@pytest.mark.parametrize(
    ("estimator", "oracle"),
    [
        (kl_k1, lambda p, q: p - q),
        (kl_k2, lambda p, q: (p - q) ** 2 / 2),
        (kl_k3, lambda p, q: np.exp(q - p) - 1 - (q - p)),
    ],
)
def test_matches_float64_closed_form(estimator, oracle):
    assert_matches(estimator, oracle, [LOGPS, REF_LOGPS], argnums=(0,))


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_unbiased_under_the_policy(estimator):
    rng = np.random.default_rng(0)
    log_p, log_q = (np.log(rng.dirichlet(np.ones(9))) for _ in range(2))
    exact = np.sum(np.exp(log_p) * (log_p - log_q))
    k = estimator(np.float32(log_p)[None], np.float32(log_q)[None])[0]
    np.testing.assert_allclose(np.sum(np.exp(log_p) * k), exact, rtol=1e-5)


def test_k2_has_the_gradient_of_the_kl():
    rng = np.random.default_rng(1)
    logits, log_q = rng.normal(size=9), np.log(rng.dirichlet(np.ones(9)))

    def expectation(logits, estimator):  # over samples drawn before the update
        log_p = jax.nn.log_softmax(logits)
        k = estimator(log_p[None], np.float32(log_q)[None])[0]
        return (np.exp(np.array(log_p0)) * k).sum()

    log_p0 = jax.nn.log_softmax(np.float32(logits))
    got = jax.grad(expectation)(np.float32(logits), kl_k2)

    def kl(logits):
        log_p = jax.nn.log_softmax(logits)
        return (jax.numpy.exp(log_p) * (log_p - np.float32(log_q))).sum()

    want = jax.grad(kl)(np.float32(logits))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_k3_is_exact_for_close_policies():
    # exp(d) - 1 - d would give 1.7e-8, more than three times too much.
    k3 = kl_k3(np.float32([[0.0]]), np.float32([[1e-4]]))
    np.testing.assert_allclose(k3, [[5.0e-9]], rtol=0.1)


@pytest.mark.parametrize("difference", [20.0, -20.0, 100.0, -100.0, 1e3])
def test_k3_is_finite_far_away(difference):
    logps, ref = np.zeros((1, 1), "f4"), np.full((1, 1), difference, "f4")
    value, grad = jax.value_and_grad(lambda x: kl_k3(x, ref).sum())(logps)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    d = np.clip(difference, -20, 20)
    np.testing.assert_allclose(value, np.expm1(d) - d, rtol=1e-5)
