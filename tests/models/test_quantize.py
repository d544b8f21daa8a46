"""Tests for jalign/models/quantize.py: codes and values against float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jalign.models import quantize as q
from tests.models import bitsandbytes_files as oracle

_quantize = jax.jit(q.quantize, static_argnames=("method", "num_inputs", "double"))
MIDDLES = (q.NF4[1:] + q.NF4[:-1]) / 2


def unpacked(packed) -> np.ndarray:
    """[blocks, 32, ...] -> codes [64 blocks, ...]."""
    packed = np.asarray(packed)
    pairs = np.stack([packed >> 4, packed & 15], 2)
    return pairs.reshape(-1, *packed.shape[2:])


def kernel(rows: int, dtype="f4") -> np.ndarray:
    """[rows, 24]: normal weights, and columns of what is special."""
    rng = np.random.default_rng(rows)
    w = rng.normal(size=(rows, 24)).astype("f4")
    w[:, 0], w[:, 1] = 0, rng.choice([-3.0, 3.0], rows)
    w[:, 2] = np.resize([*MIDDLES, 1.0], rows)  # exact midpoints: absmax is 1
    w[:, 3] = np.resize([*(MIDDLES * 0.0371), 0.0371], rows)  # as near as float32 is
    w[5, 4] = 1e4  # an outlier
    w[:, 5] *= 1e-12
    w[:, 6] = np.nextafter(w[:, 2], np.float32(9))
    return w.astype(dtype)


def test_the_table_is_the_formulas():
    np.testing.assert_allclose(q.NF4, oracle.normal_map(), rtol=0, atol=2e-7)
    assert q.NF4[7] == 0 and q.NF4.dtype == np.float32


def test_the_dynamic_map_is_its_definition():
    want = oracle.dynamic_map()
    np.testing.assert_allclose(q.dynamic_map(), want, rtol=1e-6, atol=0)
    assert (want < 0).sum() == 127 and want.min() == pytest.approx(-0.99296874)
    got = jax.jit(q._dynamic)(jnp.arange(256, dtype=jnp.uint8))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["f4", ml_dtypes.bfloat16])
@pytest.mark.parametrize("rows", [64, 172, 320])
def test_nf4_codes_and_values_are_those_of_float64(rows, dtype):
    """Where a row is no multiple of 64, its last block is shorter."""
    w = kernel(rows, dtype)
    leaves = _quantize(w, "nf4", double=False)
    codes = unpacked(leaves["nf4"])[:rows]
    values = q.dequantize(leaves, w.shape)
    for start in range(0, rows, 64):
        block = w[start : start + 64].astype("f8")
        absmax = np.abs(block).max(0)
        np.testing.assert_array_equal(leaves["absmax"][start // 64], absmax)
        scaled = block / np.where(absmax == 0, 1, absmax)
        want = oracle.nearest(scaled, q.NF4)
        np.testing.assert_array_equal(codes[start : start + 64], want)
        meant = q.NF4.astype("f8")[want] * absmax
        np.testing.assert_allclose(values[start : start + 64], meant, rtol=1e-6)


def test_nf4_of_several_axes_is_that_of_the_flat_ones():
    w = kernel(192)
    flat = _quantize(w, "nf4")
    split = _quantize(w.reshape(4, 48, 6, 4), "nf4", num_inputs=2)
    for name, x in flat.items():
        np.testing.assert_array_equal(x.ravel(), split[name].ravel())
    values = q.dequantize(split, (4, 48, 6, 4), jnp.bfloat16)
    assert values.dtype == jnp.bfloat16
    want = q.dequantize(flat, w.shape, jnp.bfloat16)
    np.testing.assert_array_equal(values.reshape(w.shape), want)


def test_absmax_is_off_by_at_most_half_a_step_of_its_map():
    w = np.random.default_rng(0).standard_t(4, (640, 70)).astype("f4")
    leaves = _quantize(w, "nf4")
    absmax = np.abs(w.reshape(10, 64, 70)).max(1).T.ravel().astype("f8")
    rest = absmax - float(leaves["nested_offset"])
    assert float(leaves["nested_offset"]) == pytest.approx(absmax.mean(), rel=1e-6)
    got = q._absmax(leaves, lambda x: x).T.ravel()
    for group, nested in enumerate(leaves["nested_absmax"]):
        part = slice(256 * group, 256 * (group + 1))
        assert float(nested) == pytest.approx(np.abs(rest[part]).max(), rel=1e-5)
        table = oracle.dynamic_map() * float(nested)
        best = np.abs(rest[part][:, None] - table).min(1)
        error = np.abs(got[part] - absmax[part])
        np.testing.assert_allclose(error, best, rtol=0, atol=1e-5)
    assert leaves["absmax"].dtype == jnp.uint8 and len(leaves["nested_absmax"]) == 3


@pytest.mark.parametrize("method", q.METHODS)
def test_codes_of_what_codes_mean_are_the_same(method):
    w = np.random.default_rng(1).normal(size=(192, 40)).astype("f4")
    first = _quantize(w, method)
    again = _quantize(q.dequantize(first, w.shape), method)
    np.testing.assert_array_equal(first[method], again[method])


@pytest.mark.parametrize("dtype", ["f4", ml_dtypes.bfloat16])
def test_int8_is_that_of_float64(dtype):
    w = kernel(320, dtype)
    w[:, 7] = np.resize(np.arange(-127, 128) / 2, 320)  # exact ties: the scale is 1/2
    leaves = _quantize(w, "int8")
    scale = np.asarray(leaves["scale"]).astype("f8")
    np.testing.assert_allclose(scale, np.abs(w.astype("f8")).max(0) / 127, rtol=1e-7)
    want = np.rint(w.astype("f8") / np.where(scale == 0, 1, scale))
    np.testing.assert_array_equal(leaves["int8"], want)
    assert np.abs(want).max() == 127 and leaves["int8"].dtype == jnp.int8
    values = q.dequantize(leaves, w.shape)
    np.testing.assert_allclose(values, want * scale, rtol=1e-6)


def test_int8_near_ties_are_exact():
    """Half-way points of a scale that is no power of two, and their neighbours."""
    scale = np.float32(0.1)
    near = np.float32((np.arange(-126, 126) + 0.5) * np.float64(scale))
    sides = [np.nextafter(near, np.float32(s * 99)) for s in (-1, 1)]
    w = np.concatenate([near, *sides])[:, None]
    got = q._nearest(jnp.asarray(w), jnp.full((1, 1), scale))
    np.testing.assert_array_equal(got, np.rint(w.astype("f8") / np.float64(scale)))


def test_bytes_a_parameter_and_bytes_to_make_them():
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    for method, double, want in [
        ("nf4", True, 0.516),
        ("nf4", False, 0.5625),
        ("int8", True, 1.004),
    ]:
        make = functools.partial(q.quantize, method=method, double=double)
        leaves = jax.eval_shape(make, shape)
        size = sum(x.size * x.dtype.itemsize for x in leaves.values())
        assert size / 2**20 == pytest.approx(want, rel=2e-3)
        memory = jax.jit(make).lower(shape).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 1.5 * 2**20


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="fp4.*not one of nf4, int8"):
        q.quantize(jnp.ones((64, 2)), "fp4")
