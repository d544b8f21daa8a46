"""Tests for jalign/models/attention_blocked.py."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models.attention import attention_mask, plain_attention
from jalign.models.attention_blocked import (
    block_spans,
    blocked_attention,
    heads_in_cache,
)
from jalign.models.scores import PLAIN_SCORES
from tests.models.rows import SCORES, packed_rows, random_qkv

IDS, POSITIONS = packed_rows([[7, 6], [3, 10]], 13)
QKV = random_qkv((2, 13, 4, 8), 2)


BLOCKS = [(4, 4, 1), (4, 2, 2), (8, 2, None)]
CASES = [(None, *case) for case in itertools.product([None, 3], [True, False], BLOCKS)]
CASES += [("softcap", 3, True, BLOCKS[1])]
CASES += [("alibi", None, True, BLOCKS[1]), ("all", 3, True, BLOCKS[0])]
CASES += [("all", None, False, BLOCKS[2])]


@pytest.mark.parametrize(("name", "window", "segments", "sizes"), CASES)
def test_values_and_gradients_match_plain(name, window, segments, sizes):
    scores = PLAIN_SCORES if name is None else SCORES[name]
    ids = IDS if segments else np.ones_like(IDS)
    positions = POSITIONS if segments else np.broadcast_to(np.arange(13), IDS.shape)
    mask = attention_mask(positions, positions, ids, ids, window)
    weight = random_qkv((2, 13, 4, 8), 2, seed=1)[0]

    def plain(*qkv):
        where = scores, jnp.asarray(positions), jnp.asarray(positions)
        return (weight * plain_attention(*qkv, jnp.asarray(mask), *where)).sum()

    def blocked(*qkv):
        segment_ids = ids if segments else None
        how = dict(zip(("block", "piece", "heads"), sizes, strict=True))
        out = blocked_attention(*qkv, segment_ids, window, scores, **how)
        return (weight * out).sum()

    want = jax.value_and_grad(plain, (0, 1, 2))(*QKV)
    got = jax.jit(jax.value_and_grad(blocked, (0, 1, 2)))(*QKV)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want
    )


def test_spans_cover_queries_once_and_skip_masked_keys():
    whole = [(0, 4, 0, 1), (4, 8, 0, 1), (8, 10, 0, 1)]
    assert block_spans(10, None, 4, 4) == tuple(whole)
    assert block_spans(10, 3, 4, 4)[1:] == ((4, 8, 2, 1), (8, 10, 6, 1))
    assert block_spans(15, None, 8, 4)[1:] == ((8, 12, 0, 1), (12, 15, 0, 1))
    assert block_spans(512, None) == tuple(
        (n, n + 128, 0, 1) for n in (0, 128, 256, 384)
    )
    long = block_spans(32768 - 5, None)
    assert len(long) == 17 and {span.pieces for span in long} == {16, 15, 1}
    assert [span.start for span in long[1:]] == [span.end for span in long[:-1]]


@pytest.mark.parametrize(
    "batch, length, heads, want",
    # A head's queries take 2 x 128 x 512 x 4 bytes a row: half a MiB.
    [(4, 512, 6, 1), (1, 512, 6, 3), (2, 256, 6, 3), (1, 32, 6, 6), (8, 512, 1, 1)],
)
def test_as_many_heads_at_once_as_fit_a_cache(batch, length, heads, want):
    q, k = np.zeros((batch, length, 2 * heads, 8)), np.zeros((batch, length, heads, 8))
    assert heads_in_cache(q, k, 2 << 20) == want  # pyright: ignore


@pytest.mark.parametrize("heads", [None, 1])
def test_memory_grows_with_the_length_and_not_with_its_square(heads):
    def bytes_a_token(length):
        def loss(q, k, v, ids):  # four blocks: there is less to compile
            how = {"block": length // 4, "piece": 64, "heads": heads}
            return blocked_attention(q, k, v, ids, None, **how).sum()

        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        gradient = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, ids)
        return gradient.compile().memory_analysis().temp_size_in_bytes / length

    assert bytes_a_token(8192) < 1.05 * bytes_a_token(4096)


def test_no_array_of_all_scores_is_stored():
    q, k, v = random_qkv((1, 512, 2, 8), 2)

    def loss(q):
        return blocked_attention(q, k, v, None, None, block=64, piece=64).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss))(q)
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) < 512 * 512
