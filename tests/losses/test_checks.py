"""Tests for jalign/losses/checks.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.losses.checks import elementwise


@elementwise(rank=1)
def power(x, y, *, exponent=2.0):
    """x y^exponent."""
    return x * y**exponent


def test_nan_stays_visible_but_has_no_gradient():
    x, y = np.float32([1, np.nan, 3, 4]), np.float32([1, 2, np.nan, 2])
    np.testing.assert_array_equal(power(x, y), [1, np.nan, np.nan, 16])
    grads = jax.grad(lambda x, y: jnp.nansum(power(x, y)), (0, 1))(x, y)
    np.testing.assert_array_equal(grads, [[1, 0, 0, 4], [2, 0, 0, 16]])


@elementwise(rank=1, bools=("keep",))
def kept(x, keep, y):
    """x or 0, plus y where there is one."""
    x = jnp.where(keep, x, 0.0)
    return x if y is None else x + y


def test_bools_are_checked_but_not_cleaned_and_none_goes_through():
    x, keep = np.float32([1, np.nan, 3]), np.array([True, True, False])
    np.testing.assert_array_equal(kept(x, keep, None), [1, np.nan, 0])
    np.testing.assert_array_equal(kept(x, keep, x), [2, np.nan, 3])
    for bad in (keep[:1], keep.astype("f4"), keep[:, None]):
        with pytest.raises(AssertionError):
            kept(x, bad, None)
    with pytest.raises(AssertionError):
        kept(x, keep, x[:1])


def test_infinite_inputs_are_not_hidden():
    got = power(np.float32([np.inf]), np.float32([1]))
    np.testing.assert_array_equal(got, [np.inf])


def test_arrays_may_be_named_and_scalars_must_be():
    x, y = np.float32([2.0]), np.float32([3.0])
    np.testing.assert_array_equal(power(y=y, x=x, exponent=3.0), [54.0])
    with pytest.raises(TypeError):
        power(x, y, 3.0)
    assert power.__doc__ == "x y^exponent." and power.__name__ == "power"
