"""Tests for jalign/losses/reduce.py."""

import functools

import jax
import numpy as np
import pytest

from jalign.losses import (
    fixed_length_mean,
    masked_mean,
    masked_var,
    masked_whiten,
    sequence_mean,
    sequence_sum_mean,
    token_mean,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 5)).astype(np.float32)
MASK = np.array([[1] * 5, [1, 0, 1, 0, 0], [0] * 5, [0, 1, 1, 1, 0]], bool)
COUNTED = X.astype("f8")[MASK]


def test_statistics_are_those_of_the_counted_entries():
    np.testing.assert_allclose(masked_mean(X, MASK), COUNTED.mean(), rtol=1e-6)
    np.testing.assert_allclose(masked_var(X, MASK), COUNTED.var(ddof=1), rtol=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_entries_have_unit_variance(shift_mean):
    got = masked_whiten(X, MASK, shift_mean=shift_mean)
    want = (COUNTED - COUNTED.mean()) / np.sqrt(COUNTED.var(ddof=1) + 1e-8)
    want = want if shift_mean else want + COUNTED.mean()
    np.testing.assert_allclose(np.asarray(got)[MASK], want, rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(got)[~MASK])


@pytest.mark.parametrize("value", [0.0, 1e-25, 0.1, 1e3 / 7, 1e4 / 3, -3e4])
def test_equal_entries_whiten_to_zero_rather_than_to_rounding_noise(value):
    got = masked_whiten(np.full((3, 7), value, "f4"), np.ones((3, 7), bool))
    np.testing.assert_array_equal(got, np.zeros((3, 7)))


def test_entries_that_differ_beside_a_large_mean_are_still_whitened():
    x = np.float32([[1e4, 1e4 + 1, 1e4 + 2]])
    got = masked_whiten(x, np.ones((1, 3), bool))
    np.testing.assert_allclose(got, [[-1, 0, 1]], atol=1e-3)


def test_the_variance_of_two_entries_is_half_their_squared_distance():
    assert masked_var(np.float32([1, 9, 3]), np.array([True, False, True])) == 2.0


def test_rounding_noise_is_told_by_the_largest_entry_however_small():
    got = masked_whiten(np.float32([[1e-7, 3e-7]]), np.ones((1, 2), bool))
    np.testing.assert_allclose(got, [[-1e-3, 1e-3]], rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_entries_give_zeros_not_nan(count):
    mask = np.arange(5) < count
    x = np.where(mask, 2.0, np.nan).astype(np.float32)
    assert masked_mean(x, mask) == 2.0 * count
    assert masked_var(x, mask) == 0
    assert not np.any(masked_whiten(x, mask))


def test_reductions_return_their_sum_and_what_to_divide_it_by():
    rows = [X[i].astype("f8")[MASK[i]] for i in (0, 1, 3)]
    total = COUNTED.sum()
    np.testing.assert_allclose(token_mean(X, MASK), (total, 10), rtol=1e-6)
    means = sum(row.mean() for row in rows)
    np.testing.assert_allclose(sequence_mean(X, MASK), (means, 3), rtol=1e-5)
    sums = sequence_sum_mean(X, MASK)
    np.testing.assert_allclose(sums, (total, 3), rtol=1e-6)
    fixed = fixed_length_mean(X, MASK, length=5)
    np.testing.assert_allclose(fixed, (total, 15), rtol=1e-6)


REDUCTIONS = [
    token_mean,
    sequence_mean,
    sequence_sum_mean,
    functools.partial(fixed_length_mean, length=5),
]


@pytest.mark.parametrize(
    "reduction", REDUCTIONS, ids=["token", "sequence", "sum", "fixed"]
)
def test_microbatches_add_up_to_the_batch(reduction):
    parts = [reduction(X[i : i + 1], MASK[i : i + 1]) for i in range(4)]
    np.testing.assert_allclose(np.sum(parts, axis=0), reduction(X, MASK), rtol=1e-5)


@pytest.mark.parametrize(
    "reduction", REDUCTIONS, ids=["token", "sequence", "sum", "fixed"]
)
def test_nothing_counted_is_zero_over_zero_with_zero_gradient(reduction):
    x, mask = np.full((2, 3), np.nan, "f4"), np.zeros((2, 3), bool)
    assert reduction(x, mask) == (0, 0)
    grad = jax.grad(lambda x: reduction(x, mask)[0])(x)
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))


def test_entries_agree_up_to_a_millionth_of_the_largest():
    mask = np.ones((1, 2), bool)
    for gap, agree in ((2.0**-20, True), (2.0**-19, False)):  # deviations 0.7, 1.3e-6
        got = masked_whiten(np.float32([[1.0, 1.0 + gap]]), mask)
        whitened = gap / 2 / np.sqrt(gap**2 / 2 + 1e-8)
        want = [[0.0, 0.0]] if agree else [[-whitened, whitened]]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_an_empty_array_whitens_to_an_empty_array():
    got = masked_whiten(np.zeros((0, 3), "f4"), np.zeros((0, 3), bool))
    assert got.shape == (0, 3)


@pytest.mark.parametrize(
    "reduction", REDUCTIONS, ids=["token", "sequence", "sum", "fixed"]
)
def test_sum_and_count_are_float32(reduction):
    assert [x.dtype for x in reduction(X, MASK)] == [np.float32] * 2


def test_reductions_of_sequences_refuse_what_has_no_rows_of_tokens():
    for reduction in REDUCTIONS[1:]:
        for x, mask in ((X[0], MASK[0]), (X[..., None], MASK[..., None])):
            with pytest.raises(AssertionError):
                reduction(x, mask)
