"""Tests for jalign/models/attention.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models import attend
from tests.models.rows import oracle, packed_rows, random_qkv

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
def test_one_query_is_the_last_row_of_all(window):
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
    )
    kept = np.delete(np.arange(13), 5)
    all_rows = attend(
        Q[:, kept],
        K[:, kept],
        V[:, kept],
        q_positions=np.tile(kept, (2, 1)).astype(np.int32),
        kv_positions=np.tile(kept, (2, 1)).astype(np.int32),
        sliding_window=window,
        implementation="plain",
    )
    np.testing.assert_allclose(got[:, 0], all_rows[:, -1], atol=1e-6)
