"""Tests for jalign/models/attention.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models import attend
from jalign.models.attention import cudnn_obstacle
from jalign.models.scores import Scores
from tests.models.rows import SCORES, SLOPES, oracle, packed_rows, random_qkv

IDS, POSITIONS = packed_rows([[7, 5], [3, 4, 2]], 13)
Q, K, V = random_qkv((2, 13, 4, 8), 2)


def run(implementation, window=None, **kwargs):
    return attend(
        Q,
        K,
        V,
        q_positions=POSITIONS,
        kv_positions=POSITIONS,
        q_segment_ids=IDS,
        kv_segment_ids=IDS,
        sliding_window=window,
        implementation=implementation,
        **kwargs,
    )


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("implementation", ["auto", "plain", "blocked"])
def test_matches_float64_loops(implementation, window):
    want = oracle(Q, K, V, IDS, POSITIONS, window)
    real = IDS > 0
    got = run(implementation, window)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("implementation", ["plain", "blocked"])
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_scaled_biased_and_capped_as_in_float64(name, implementation):
    want = oracle(Q, K, V, IDS, POSITIONS, 5, SCORES[name])
    got = run(implementation, 5, scores=SCORES[name])
    real = IDS > 0
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
    assert abs(got - run("plain", 5))[real].max() > 0.01


@pytest.mark.parametrize("implementation", ["auto", "plain", "blocked"])
def test_falcons_alibi_is_rounded_and_scaled_with_the_scores(implementation):
    """Exact in bfloat16 for few tokens and slopes of powers of two."""
    scores = Scores(slopes=SLOPES, rounded=True)
    want = oracle(Q, K, V, IDS, POSITIONS, scores=scores)
    got = run(implementation, scores=scores)
    np.testing.assert_allclose(got[IDS > 0], want[IDS > 0], atol=1e-5)
    # Beyond 256 a bfloat16 has steps of 2: the bias of a key is a staircase.
    zeros = jnp.zeros((1, 1, 1, 1, 4))
    at, keys = jnp.array([[259]]), jnp.array([[256, 257, 258, 259]])
    one = Scores(scale=1.0, slopes=(0.25,), rounded=True)
    got = one.of(zeros, 8, at, keys)[0, 0, 0, 0]
    np.testing.assert_array_equal(got, [64, 64, 64.5, 65])


def test_kernels_say_what_scores_they_do_not_have():
    with pytest.raises(ValueError, match="splash.*ALiBi"):
        run("splash", scores=SCORES["alibi"])
    half = Q.astype(jnp.bfloat16)
    assert cudnn_obstacle(half, half, None, SCORES["scale"]) is None
    for name in ("alibi", "softcap"):
        assert "ALiBi" in str(cudnn_obstacle(half, half, None, SCORES[name]))


def test_out_of_order_queries_see_slots_up_to_their_position():
    slots = np.broadcast_to(np.arange(13), (2, 13))
    at = np.array([[4, 2], [12, 0]])
    got = attend(
        Q[:, :2], K, V, q_positions=at, kv_positions=slots, implementation="blocked"
    )
    for b in range(2):
        for t in range(2):
            q = np.broadcast_to(Q[b, t], (1, at[b, t] + 1, 4, 8))
            n = q.shape[1]
            zeros, steps = np.zeros((1, n)), np.arange(n)[None]
            want = oracle(q, K[b : b + 1, :n], V[b : b + 1, :n], zeros, steps)
            np.testing.assert_allclose(got[b, t], want[0, -1], atol=1e-5)


def test_keeps_dtype_and_refuses_what_does_not_apply():
    half = [x.astype(jnp.bfloat16) for x in (Q, K, V)]
    where = dict(q_positions=POSITIONS, kv_positions=POSITIONS)
    assert attend(*half, **where).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="float32"):
        run("cudnn")
    with pytest.raises(ValueError, match="implementation"):
        run("flash")
    with pytest.raises(ValueError, match="belong together"):
        attend(Q, K, V, **where, q_segment_ids=IDS)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scores", [Scores(), SCORES["all"]], ids=["plain", "all"])
def test_one_query_is_the_last_row_of_all(window, scores):
    """Decoding's own path, over slots in any order of which some are never seen."""
    never = np.iinfo(np.int32).max
    order = np.random.default_rng(0).permutation(13)
    positions = np.where(order == 5, never, order)[None].repeat(2, axis=0)
    got = attend(
        Q[:, 12:],
        K[:, order],
        V[:, order],
        q_positions=np.full((2, 1), 12, np.int32),
        kv_positions=positions.astype(np.int32),
        sliding_window=window,
        scores=scores,
    )
    kept = np.delete(np.arange(13), 5)
    all_rows = attend(
        Q[:, kept],
        K[:, kept],
        V[:, kept],
        q_positions=np.tile(kept, (2, 1)).astype(np.int32),
        kv_positions=np.tile(kept, (2, 1)).astype(np.int32),
        sliding_window=window,
        scores=scores,
        implementation="plain",
    )
    np.testing.assert_allclose(got[:, 0], all_rows[:, -1], atol=1e-6)
