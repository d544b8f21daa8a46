"""Tests for jalign/losses/preference.py."""

import functools

import jax
import numpy as np

from jalign import losses
from tests.losses.pairs import BETA, LOGPS, assert_all_match, log_sigmoid, sigmoid

partial = functools.partial


def with_ratios(formula):
    return lambda c, r, ref_c, ref_r: formula(c - ref_c, r - ref_r)


@with_ratios
def nca(w, l):
    noise = log_sigmoid(-BETA * w) + log_sigmoid(-BETA * l)
    return -log_sigmoid(BETA * w) - noise / 2


@with_ratios
def bco(w, l):
    return -log_sigmoid(BETA * w) - log_sigmoid(-BETA * l)


@with_ratios
def shifted_bco(w, l):
    return -log_sigmoid(BETA * w - 0.7) - log_sigmoid(-(BETA * l - 0.7))


@with_ratios
def sppo(w, l):
    return (w - 1 / (2 * BETA)) ** 2 + (l + 1 / (2 * BETA)) ** 2


@with_ratios
def apo_zero(w, l):
    return 1 - sigmoid(BETA * w) + sigmoid(BETA * l)


@with_ratios
def apo_down(w, l):
    return sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - l))


@with_ratios
def dpop(w, l):
    return -log_sigmoid(BETA * (w - l - 0.7 * np.maximum(0, -w)))


CASES = [
    (partial(losses.nca_pair_loss, beta=BETA), nca),
    (partial(losses.bco_pair_loss, beta=BETA), bco),
    (partial(losses.bco_pair_loss, beta=BETA, shift=0.7), shifted_bco),
    (partial(losses.sppo_hard_loss, beta=BETA), sppo),
    (partial(losses.apo_zero_loss, beta=BETA), apo_zero),
    (partial(losses.apo_down_loss, beta=BETA), apo_down),
]


def test_losses_of_each_side_match_float64_closed_forms():
    assert_all_match(CASES, LOGPS)


def test_dpop_matches_its_float64_closed_form_where_it_is_smooth():
    """Its kink is at log π/π_ref = 0, where the first pair lies."""
    loss = partial(losses.dpop_loss, beta=BETA, penalty=0.7)
    assert_all_match([(loss, dpop)], LOGPS[:, 1:])


def test_dpop_is_dpo_at_and_above_the_reference():
    """Value and gradient: at the start of a run all pairs lie at the kink."""
    c, r, ref_c, ref_r = np.float32([[-9, -4], [-7, -6], [-9, -5], [-7, -6]])

    def loss(function):
        return jax.vjp(lambda *x: function(*x, ref_c, ref_r, beta=BETA), c, r)

    (got, got_vjp), (want, want_vjp) = map(loss, (losses.dpop_loss, losses.dpo_loss))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    ones = np.ones(2, np.float32)
    np.testing.assert_allclose(got_vjp(ones), want_vjp(ones), rtol=1e-6)


def test_without_a_reference_any_scores_may_be_taken():
    for function, _ in CASES:
        got = function(*(LOGPS[:2] - LOGPS[2:]), None, None)
        np.testing.assert_allclose(got, function(*LOGPS), rtol=1e-6)


def test_no_gradient_flows_to_the_shift():
    def total(shift):
        return losses.bco_pair_loss(*LOGPS, beta=BETA, shift=shift).sum()

    assert jax.grad(total)(0.7) == 0
