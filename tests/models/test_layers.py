"""Tests for jalign/models/layers.py, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models.layers import Embedding, LayerNorm, RMSNorm
from jalign.models.platform import project


def test_rms_norm_matches_numpy_and_computes_in_float32():
    x = np.random.default_rng(0).normal(0, 100, (2, 3, 8))
    scale = np.arange(1.0, 9.0)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    params = {"params": {"scale": jnp.asarray(scale, jnp.float32)}}
    got = RMSNorm(1e-5).apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    half = RMSNorm(1e-5, jnp.bfloat16).apply(params, jnp.full((1, 8), 3e38, "bfloat16"))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_matches_numpy_and_computes_in_float32(with_bias):
    x = np.random.default_rng(0).normal(50, 100, (2, 3, 8))
    scale, bias = np.arange(1.0, 9.0), np.linspace(-1, 1, 8) * with_bias
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias
    leaves = {"scale": scale, "bias": bias} if with_bias else {"scale": scale}
    params = {"params": {k: jnp.float32(v) for k, v in leaves.items()}}
    got = LayerNorm(1e-5, with_bias=with_bias).apply(params, jnp.float32(x))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    far = jnp.bfloat16([[1000.0, 1008.0, 1016.0, 1024.0]])  # steps of 8
    ones = {"params": {"scale": jnp.ones(4)}}
    half = LayerNorm(1e-5, jnp.bfloat16, with_bias=False).apply(ones, far)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half[0].astype(float), [-1.34, -0.447, 0.447, 1.34], 0.01
    )


def test_an_offset_norm_starts_from_one():
    layer, x = RMSNorm(1e-5, offset=True), jnp.arange(1.0, 5.0)[None]
    params = layer.init(jax.random.key(0), x)
    np.testing.assert_array_equal(params["params"]["scale"], np.zeros(4))
    want = RMSNorm(1e-5).apply({"params": {"scale": jnp.full(4, 1.5)}}, x)
    got = layer.apply({"params": {"scale": jnp.full(4, 0.5)}}, x)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_token_outside_of_the_vocabulary_gives_nan():
    layer = Embedding(4, 3)
    params = layer.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    out = layer.apply(params, jnp.array([[0, 3, 4, -1]]))
    np.testing.assert_array_equal(np.isnan(out).all(-1), [[False, False, True, True]])


@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "btnh,nhd->btd", "btf,fd->btd"])
@pytest.mark.parametrize("wide_in", [False, True])
def test_the_gradient_of_a_projection_is_einsums(equation, wide_in):
    inputs, out = equation.split("->")
    x_axes, kernel_axes = inputs.split(",")
    sizes = dict(b=2, t=5, n=2, h=3, f=7, d=4)
    inner = set(x_axes) & set(kernel_axes)
    for axis in kernel_axes:
        sizes[axis] += 5 * ((axis in inner) == wide_in)
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel, weights = (
        jax.random.normal(key, tuple(sizes[a] for a in axes))
        for key, axes in zip(keys, (x_axes, kernel_axes, out), strict=True)
    )

    def grads(function):
        def total(x, kernel):
            return jnp.sum(weights * function(equation, x, kernel))

        return jax.jit(jax.grad(total, (0, 1)))(x, kernel)

    for got, want in zip(grads(project), grads(jnp.einsum), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
