"""Tests for jalign/losses/ratios.py."""

import numpy as np

from jalign.losses import (
    masked_importance_weights,
    off_policy_mask,
    sequence_masked_importance_weights,
    sequence_truncated_importance_weights,
    truncated_importance_weights,
)

SAMPLER = np.float32([[-1.0, -2.0, -0.5], [-1.0, -3.0, -1.0], [-1.0, -1.0, -1.0]])
DIFFERENCE = np.array([[0.1, 0.9, -0.9], [0.3, 0.5, 7.0], [-0.4, -0.5, 0.0]])
OLD = np.float32(SAMPLER + DIFFERENCE)
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]], bool)
BOUNDS = {"min_ratio": 0.5, "max_ratio": 2.0}
RATIO = np.exp(OLD.astype("f8") - SAMPLER)
SEQUENCE = np.exp(((OLD.astype("f8") - SAMPLER) * MASK).sum(1, keepdims=True))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_token_weights_are_cut_off_or_dropped():
    close(truncated_importance_weights(OLD, SAMPLER, **BOUNDS), np.clip(RATIO, 0.5, 2))
    inside = (RATIO >= 0.5) & (RATIO <= 2)
    assert inside.any() and not inside.all()
    close(masked_importance_weights(OLD, SAMPLER, **BOUNDS), RATIO * inside)


def test_sequence_weights_are_cut_off_or_dropped_as_a_whole():
    args = OLD, SAMPLER, MASK
    close(
        sequence_truncated_importance_weights(*args, **BOUNDS),
        np.clip(SEQUENCE, 0.5, 2) * MASK,
    )
    kept = (SEQUENCE >= 0.5) & (SEQUENCE <= 2)
    assert kept.ravel().tolist() == [True, False, False]
    close(sequence_masked_importance_weights(*args, **BOUNDS), SEQUENCE * kept * MASK)


def test_ratios_at_the_bounds_are_kept():
    for low, high in ((1.0, 2.0), (0.5, 1.0)):
        bounds = {"min_ratio": low, "max_ratio": high}
        close(masked_importance_weights(OLD, OLD, **bounds), np.ones((3, 3)))
        close(sequence_masked_importance_weights(OLD, OLD, MASK, **bounds), MASK)


def test_without_a_lower_bound_small_ratios_stay():
    for function in (truncated_importance_weights, masked_importance_weights):
        got = function(OLD - 9, SAMPLER, max_ratio=1e9)
        close(got, np.exp((OLD - 9).astype("f8") - SAMPLER))
    for function in (
        sequence_truncated_importance_weights,
        sequence_masked_importance_weights,
    ):
        close(function(OLD, SAMPLER, MASK, max_ratio=1e9), SEQUENCE * MASK)


def test_off_policy_sequences_are_dropped_only_if_their_advantage_is_negative():
    # mean_t (sampler - logps): -0.03, -0.4, 0.45
    for sign, threshold, kept in [
        (-1.0, 0.2, [1, 1, 0]),
        (-1.0, 0.5, [1, 1, 1]),
        (-1.0, -0.1, [0, 1, 0]),
        (0.0, -0.1, [1, 1, 1]),
        (1.0, -0.1, [1, 1, 1]),
    ]:
        advantages = np.full_like(OLD, sign)
        got = off_policy_mask(OLD, SAMPLER, advantages, MASK, threshold=threshold)
        np.testing.assert_array_equal(got, np.array(kept)[:, None] * MASK)


def test_a_sequence_exactly_at_the_threshold_stays():
    mask = np.arange(11)[None] < 10
    sampler = np.where(mask, np.float32(0.0), np.nan)
    logps = sampler - np.eye(1, 11, dtype="f4") * 7
    threshold, advantages = np.float32(0.7), np.full((1, 11), -1.0, "f4")
    got = off_policy_mask(logps, sampler, advantages, mask, threshold=threshold)
    np.testing.assert_array_equal(got, mask.astype("f4"))
