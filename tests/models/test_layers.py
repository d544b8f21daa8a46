"""Tests for jalign/models/layers.py, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models.layers import (
    Embedding,
    RMSNorm,
    rope_frequencies,
    rope_tables,
    rotate,
)
from jalign.models.platform import project
from tests.models.tiny import CONFIGS


def test_rms_norm_matches_numpy_and_computes_in_float32():
    x = np.random.default_rng(0).normal(0, 100, (2, 3, 8))
    scale = np.arange(1.0, 9.0)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    params = {"params": {"scale": jnp.asarray(scale, jnp.float32)}}
    got = RMSNorm(1e-5).apply(params, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    half = RMSNorm(1e-5, jnp.bfloat16).apply(params, jnp.full((1, 8), 3e38, "bfloat16"))
    assert half.dtype == jnp.bfloat16


def test_rotation_is_by_pairs_half_a_head_apart():
    config = CONFIGS["llama"]
    positions = np.array([[0, 3, 7]])
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 10))
    angle = positions[..., None] * 10_000.0 ** (-np.arange(0, 10, 2) / 10)
    z = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angle)[:, :, None]
    want = np.concatenate([z.real, z.imag], -1)
    cos, sin = rope_tables(config, jnp.asarray(positions))["main"]
    got = rotate(jnp.asarray(x, jnp.float32), cos, sin)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_scaled_frequencies_keep_fast_and_divide_slow_ones():
    plain, _ = rope_frequencies(CONFIGS["llama"])
    linear, _ = rope_frequencies(CONFIGS["linear"])
    np.testing.assert_allclose(linear, plain / 2, rtol=1e-6)
    for name, factor in (("llama3", 8), ("yarn", 4)):
        scaled, _ = rope_frequencies(CONFIGS[name])
        np.testing.assert_allclose(scaled[-1], plain[-1] / factor, rtol=1e-6)
        assert (scaled <= plain * (1 + 1e-6)).all()
    assert rope_frequencies(CONFIGS["yarn"])[1] == pytest.approx(1 + 0.1 * np.log(4))


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
