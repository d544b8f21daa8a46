"""Tests for the kernels of attention: splash interpreted, cuDNN's guards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models.attention import (
    attention_mask,
    cudnn_obstacle,
    plain_attention,
)
from jalign.models.attention_splash import splash_attention
from jalign.models.scores import PLAIN_SCORES, Scores
from tests.models.rows import packed_rows, random_qkv

IDS, POSITIONS = packed_rows([[100, 40], [60, 90]], 150)


CAPPED = Scores(scale=0.7, softcap=0.8)  # as Gemma 2 has them


@pytest.mark.parametrize(
    ("window", "scores"),
    [(None, PLAIN_SCORES), (20, PLAIN_SCORES), (20, CAPPED)],
)
def test_interpreted_splash_matches_plain_with_gradients(window, scores):
    qkv = random_qkv((2, 150, 4, 16), 2)
    mask = jnp.asarray(attention_mask(POSITIONS, POSITIONS, IDS, IDS, window))
    real = jnp.asarray(IDS > 0)[..., None, None]

    def plain(*qkv):
        return (jnp.where(real, plain_attention(*qkv, mask, scores), 0) ** 2).sum()

    def splash(*qkv):
        segment_ids = jnp.asarray(IDS)
        out = splash_attention(*qkv, segment_ids, window, scores, interpret=True)
        return (jnp.where(real, out, 0) ** 2).sum()

    want = jax.value_and_grad(plain, (0, 1, 2))(*qkv)
    got = jax.jit(jax.value_and_grad(splash, (0, 1, 2)))(*qkv)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, want)


@pytest.mark.parametrize("tensor", [2, 4])
def test_interpreted_splash_on_a_mesh(tensor):
    """With tensor=4 the two kv heads do not divide and are repeated."""
    mesh = sharding.make_mesh(fsdp=-1, tensor=tensor)
    q, k, v = random_qkv((4, 150, 4, 16), 2)
    steps = np.broadcast_to(np.arange(150), (4, 150))
    mask = jnp.asarray(attention_mask(steps, steps, None, None, None))
    want = plain_attention(q, k, v, mask)

    @jax.jit
    def splash(q, k, v):
        return splash_attention(q, k, v, None, None, mesh=mesh, interpret=True)

    np.testing.assert_allclose(splash(q, k, v), want, atol=1e-5)


def test_cudnn_guards():
    def obstacle(dtype=jnp.bfloat16, length=32, head_dim=64, segments=False):
        q = jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if segments else None
        return cudnn_obstacle(q, q, ids)

    assert obstacle() is None and obstacle(segments=True) is None
    assert "dtype" in obstacle(dtype=jnp.float32)
    assert "head dim" in obstacle(head_dim=256) and "head dim" in obstacle(head_dim=20)
    assert "even" in obstacle(length=33, segments=True)
