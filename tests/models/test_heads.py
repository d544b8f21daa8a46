"""Tests for jalign/models/heads.py."""

import jax
import jax.numpy as jnp
import numpy as np

from jalign.models.heads import init_score_head, score


def test_score_is_a_float32_product():
    hidden = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f4")
    kernel = np.array([[1.0], [2.0], [-1.0], [0.5]], "f4")
    got = score({"score": {"kernel": kernel}}, jnp.asarray(hidden))
    np.testing.assert_allclose(got, hidden @ kernel[:, 0], rtol=1e-6)
    half = score({"score": {"kernel": kernel}}, jnp.asarray(hidden, jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_initial_scale(key: jax.Array):
    kernel = init_score_head(key, 4095)["kernel"]
    assert kernel.shape == (4095, 1)
    np.testing.assert_allclose(kernel.std(), 1 / 64, rtol=0.05)
