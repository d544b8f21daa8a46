"""Tests for jalign/models/attention_blocked.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models.attention import attention_mask, plain_attention
from jalign.models.attention_blocked import block_ranges, blocked_attention
from tests.models.rows import packed_rows, random_qkv

IDS, POSITIONS = packed_rows([[7, 6], [3, 10]], 13)
QKV = random_qkv((2, 13, 4, 8), 2)


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_values_and_gradients_match_plain(window, segments):
    ids = IDS if segments else np.ones_like(IDS)
    positions = POSITIONS if segments else np.broadcast_to(np.arange(13), IDS.shape)
    mask = attention_mask(positions, positions, ids, ids, window)
    weight = random_qkv((2, 13, 4, 8), 2, seed=1)[0]

    def plain(*qkv):
        return (weight * plain_attention(*qkv, jnp.asarray(mask))).sum()

    def blocked(*qkv):
        out = blocked_attention(*qkv, ids if segments else None, window, block=4)
        return (weight * out).sum()

    want = jax.value_and_grad(plain, (0, 1, 2))(*QKV)
    got = jax.jit(jax.value_and_grad(blocked, (0, 1, 2)))(*QKV)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want
    )


def test_ranges_cover_queries_once_and_skip_masked_keys():
    assert block_ranges(10, None, 4) == [(0, 4, 0), (4, 8, 0), (8, 10, 0)]
    assert block_ranges(10, 3, 4) == [(0, 4, 0), (4, 8, 2), (8, 10, 6)]
    assert len(block_ranges(32768, None)) <= 16
    assert len(block_ranges(512, None)) == 4


def test_no_array_of_all_scores_is_stored():
    q, k, v = random_qkv((1, 512, 2, 8), 2)

    def loss(q):
        return blocked_attention(q, k, v, None, None, block=64).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(q)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) < 512 * 512
