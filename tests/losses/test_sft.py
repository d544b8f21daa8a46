"""Tests for jalign/losses/sft.py."""

import jax
import numpy as np
import pytest

from jalign.losses import cross_entropy, dft_loss, token_cross_entropy, token_mean
from tests.losses.oracle import assert_matches, log_softmax

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(2, 3, 5))).astype(np.float32)
TARGETS = RNG.integers(0, 5, size=(2, 3)).astype(np.int32)
OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-2)]


def oracle(logits, eps, z_loss):
    log_p = log_softmax(logits)
    nll = -np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
    log_z = logits[..., 0] - log_p[..., 0]
    return (1 - eps) * nll - eps * log_p.mean(-1) + z_loss * log_z**2


@pytest.mark.parametrize(("eps", "z_loss"), OPTIONS)
def test_matches_float64_closed_form(eps, z_loss):
    assert_matches(
        lambda x: cross_entropy(x, TARGETS, label_smoothing=eps, z_loss=z_loss),
        lambda x: oracle(x, eps, z_loss),
        [LOGITS],
        argnums=(0,),
    )


@pytest.mark.parametrize(("eps", "z_loss"), OPTIONS)
def test_chunked_form_matches_float64_closed_form(eps, z_loss):
    hidden = RNG.normal(size=(2, 3, 4))
    unembed = RNG.normal(size=(4, 5))
    options = {"label_smoothing": eps, "z_loss": z_loss, "softcap": 2.0}

    def by_hidden(hidden, unembed):
        return oracle(2 * np.tanh(hidden @ unembed / 2), eps, z_loss)

    assert_matches(
        lambda h, w: token_cross_entropy(h, w, TARGETS, chunk_size=4, **options),
        by_hidden,
        [hidden, unembed],
        argnums=(0, 1),
    )


@pytest.mark.parametrize("top", [1e4, 3e38])
def test_huge_logits_are_finite(top):
    logits = np.float32([[0.0, top, -top], [-top, 0.0, -np.inf]])
    targets = np.int32([1, 1])
    value, grad = jax.value_and_grad(lambda x: cross_entropy(x, targets).sum())(logits)
    assert value == 0 and not np.any(grad)


def test_label_smoothing_does_not_overflow_on_the_way():
    loss = cross_entropy(
        np.float32([[3e38, 0, 0, 0]]), np.int32([0]), label_smoothing=0.1
    )
    np.testing.assert_allclose(loss, [0.1 * 0.75 * 3e38], rtol=1e-5)


LOGPS = np.float32([[-0.1, -2.0, -9.0], [0.0, -0.7, -30.0]])


def test_dft_matches_float64_closed_form_with_frozen_weights():
    weights = np.exp(LOGPS.astype("f8"))
    assert_matches(dft_loss, lambda x: -weights * x, [LOGPS], (0,))


def test_token_weights_are_a_product_before_the_reduction():
    weights = np.float32(RNG.random(TARGETS.shape))
    mask = np.array([[1, 1, 0], [0, 1, 1]], bool)

    def weighted(logits):
        total, count = token_mean(weights * cross_entropy(logits, TARGETS), mask)
        return total / count

    def by_hand(logits):
        loss = (mask * weights.astype("f8") * oracle(logits, 0.0, 0.0)).sum()
        return loss / mask.sum()

    assert_matches(weighted, lambda x: np.asarray(by_hand(x)), [LOGITS], (0,))


def test_smoothing_and_z_loss_are_off_by_default():
    hidden = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    unembed = RNG.normal(size=(4, 5)).astype(np.float32)
    want = oracle(hidden.astype("f8") @ unembed, 0.0, 0.0)
    got = token_cross_entropy(hidden, unembed, TARGETS)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    got = cross_entropy(hidden @ unembed, TARGETS)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_dft_weighs_what_is_no_log_probability_by_1():
    np.testing.assert_array_equal(dft_loss(np.float32([[0.5, 2.0]])), [[-0.5, -2.0]])
