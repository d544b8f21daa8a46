"""Tests for jalign/losses/scores.py."""

import jax
import numpy as np
import pytest

from jalign import losses
from tests.losses.oracle import assert_matches, log_softmax

RNG = np.random.default_rng(0)
MASK = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0] * 5], bool)
OTHER = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]], bool)
LOGPS = -3 * RNG.random((4, 5)).astype(np.float32)
LOGITS = (3 * RNG.normal(size=(4, 5, 7))).astype(np.float32)


def test_tokens_beyond_the_shorter_length_weigh_alpha():
    got = losses.ld_weights(MASK, OTHER, alpha=0.3)
    a = np.float32(0.3)
    want = [[0, 1, 1, a, a], [1, 1, 1, 0, 0], [a, 0, a, a, a], [0] * 5]
    np.testing.assert_array_equal(got, np.float32(want))


def test_weighted_sums_are_ld_dpo_and_no_nan_comes_from_padding():
    dirty = np.where(MASK, LOGPS, np.nan)

    def ld_logps(x):
        weights = losses.ld_weights(MASK, OTHER, alpha=0.3)
        return losses.sequence_logps(weights * x, MASK)

    for i, shared in enumerate((2, 3, 0, 0)):
        x = LOGPS[i, MASK[i]].astype("f8")
        want = x[:shared].sum() + 0.3 * x[shared:].sum()
        np.testing.assert_allclose(ld_logps(dirty)[i], want, rtol=1e-5)
    grad = jax.grad(lambda x: ld_logps(x).sum())(dirty)
    np.testing.assert_array_equal(grad, losses.ld_weights(MASK, OTHER, alpha=0.3))


def test_collision_entropy_matches_float64_closed_form():
    assert_matches(
        losses.collision_entropy_from_logits,
        lambda x: -np.log((np.exp(log_softmax(x)) ** 2).sum(-1)),
        [LOGITS],
        argnums=(0,),
    )


def test_an_impossible_token_does_no_harm_to_the_collision_entropy():
    logits = np.float32([0.0, 1.0, -np.inf])
    got, grad = jax.value_and_grad(losses.collision_entropy_from_logits)(logits)
    want = losses.collision_entropy_from_logits(logits[:2])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.all(np.isfinite(grad)) and grad[2] == 0


def collision_entropy(logits, rows, consts):
    return losses.collision_entropy_from_logits(logits)


def test_it_is_a_row_function_of_map_logits():
    hidden = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    unembed = RNG.normal(size=(4, 7)).astype(np.float32)
    got = losses.map_logits(collision_entropy, hidden, unembed, chunk_size=4)
    want = losses.collision_entropy_from_logits(hidden @ unembed)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_wpo_weights_match_float64_closed_form_without_gradient():
    entropy = np.float32(RNG.random((4, 5)))
    got = losses.wpo_weights(LOGPS, entropy, MASK)
    rows = zip(LOGPS.astype("f8") + entropy, MASK, strict=True)
    want = [np.exp(x[m].mean()) if m.any() else 1.0 for x, m in rows]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_wpo_weight_of_a_uniform_policy_is_1():
    uniform = np.zeros((4, 5, 7), np.float32)
    entropy = losses.collision_entropy_from_logits(uniform)
    got = losses.wpo_weights(np.full((4, 5), -np.log(7), "f4"), entropy, MASK)
    np.testing.assert_allclose(got, np.ones(4), rtol=1e-6)


def test_wpo_weights_stop_where_a_product_is_still_finite():
    logps = np.float32([[-39.0] * 2, [-1e3] * 2, [0.0] * 2, [0.0] * 2])
    entropy = np.float32([[0.0] * 2, [0.0] * 2, [39.0] * 2, [1e3] * 2])
    got = losses.wpo_weights(logps, entropy, np.ones((4, 2), bool))
    np.testing.assert_allclose(got, np.exp([-39.0, -40, 39, 40]), rtol=1e-5)


def test_wpo_weights_refuse_a_mask_of_another_rank():
    for mask in (np.array(True), MASK[0], MASK[..., None], MASK.astype("f4")):
        with pytest.raises(AssertionError):
            losses.wpo_weights(LOGPS, LOGPS, mask)
