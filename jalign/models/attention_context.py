"""Attention from a device's share of the queries to all keys of the row, without a
kernel: FlashAttention (arXiv:2205.14135) in loops over tiles of keys.

Which keys causality and the window leave to a piece of queries depends on the device.
So does the loop's length, then: it is not unrolled, as in attention_blocked.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jalign import sharding
from jalign.models.attention_blocked import tile_gradients
from jalign.models.attention_splash import with_enough_heads
from jalign.models.platform import KEPT
from jalign.models.scores import MASKED, PLAIN_SCORES, Scores, masked_scores
from jalign.sharding import context

PIECE, TILE = 128, 512
_QUERIES = "batch", "time", "act_heads", None
_KEYS = "batch", "time", "act_kv_heads", None


def context_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    scores: Scores = PLAIN_SCORES,
    *,
    mesh: Mesh,
) -> jax.Array:
    """attention.attend for queries and keys of the same tokens, in order, whose time is
    cut over the mesh's context axis. Queries are dealt in balance, keys gathered.

    Args:
      q: [B, T, N, H]; 2 * context divides T.
      k, v: [B, T, K, H].
      segment_ids: int32 [B, T] or None.
      sliding_window, scores: as of `attend`.

    Returns: [B, T, N, H] in q's dtype.
    """
    k, v = with_enough_heads(q, k, v, mesh)
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    slopes = jnp.asarray(scores.slopes or np.zeros(q.shape[2]), jnp.float32)

    def local(q, k, v, slopes, q_ids, kv_ids):
        q, q_ids = context.deal(q), context.deal(q_ids)
        k, v = context.gather_time(k), context.gather_time(v)
        starts = context.dealt_starts(q.shape[1])
        where = starts, q_ids, kv_ids, sliding_window
        return context.undeal(attend_from(q, k, v, slopes, *where, scores))

    ids_axes = ("batch", "time"), ("batch", None)
    in_axes = [_QUERIES, _KEYS, _KEYS, ("act_heads",), *ids_axes]
    fn = sharding.shard_map(local, mesh, in_axes, _QUERIES)
    return fn(q, k, v, slopes, segment_ids, segment_ids)


def attend_from(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slopes: jax.Array,
    starts: jax.Array,
    q_ids: jax.Array,
    kv_ids: jax.Array,
    sliding_window: int | None,
    scores: Scores = PLAIN_SCORES,
    piece: int = PIECE,
    tile: int = TILE,
) -> jax.Array:
    """Attention from runs of queries to all keys of their row.

    Args:
      q: [B, R * L, N, H], R runs of L neighbours in the row.
      k, v: [B, T, K, H].
      slopes: float32 [N], read where the scores have some.
      starts: int32 [R], where the runs begin in the row.
      q_ids, kv_ids: segments, int32 [B, R * L] and [B, T].
      sliding_window, scores: as of `attend`.
      piece, tile: queries and keys whose scores are in memory at once.

    Returns: [B, R * L, N, H] in q's dtype.
    """
    (B, _, N, H), (T, K), R = q.shape, k.shape[1:3], len(starts)
    run = q.shape[1] // R
    piece, tile = min(piece, run), min(tile, T)
    more, behind = -run % piece, -T % tile  # which no query sees, for they are later

    def cut(x):  # [B, R * L, ...] -> [pieces, B, piece, ...]
        x = x.reshape(B, R, run, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, more), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(B, -1, piece, *x.shape[3:]), 1, 0)

    first = (starts[:, None] + jnp.arange(0, run, piece)[None]).reshape(-1)
    queries = cut(q.reshape(B, -1, K, N // K, H)).transpose(0, 1, 3, 4, 2, 5)
    k, v = (jnp.pad(x, [(0, 0), (0, behind), (0, 0), (0, 0)]) for x in (k, v))
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    ids = cut(q_ids).astype(jnp.float32), jnp.pad(kv_ids, [(0, 0), (0, behind)])
    where = first, ids[0], ids[1].astype(jnp.float32)
    how = tile, sliding_window, scores
    given = queries, k, v, slopes.reshape(1, K, -1), *where
    out: jax.Array = _attend(*how, *given)  # pyright: ignore[reportAssignmentType]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(B, R, run + more, N, H)
    return out[:, :, :run].reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(tile, window, how, q, k, v, slopes, first, q_ids, kv_ids):
    return _forward(tile, window, how, q, k, v, slopes, first, q_ids, kv_ids)[0]


def _tiles(first, queries: int, keys: int, tile: int, window: int | None):
    """The tiles of keys that a piece of queries sees: from, to."""
    seen = jnp.minimum((first + queries - 1) // tile + 1, keys // tile)
    if window is None:
        return 0, seen
    return jnp.maximum(first - window + 1, 0) // tile, seen


def _of_tile(x: jax.Array, number, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * tile, tile, axis=-1)


def _tile_scores(tile, window, how, q, k, slopes, first, ids, kv_ids, number):
    """Of a piece of queries [B, K, G, t, H] with a tile of keys, as `masked_scores`."""
    queries = first + jnp.arange(q.shape[3])
    keys = number * tile + jnp.arange(tile)
    places = queries.astype(jnp.float32), keys.astype(jnp.float32)
    ids = ids, _of_tile(kv_ids, number, tile)
    bias = slopes if how.slopes else None
    return masked_scores(q, k, bias, *places, ids, window, how)


def _forward(tile, window, how, q, k, v, slopes, first, q_ids, kv_ids):
    """q [n, B, K, G, t, H], k and v [B, K, H, T] -> out as q, and what the backward
    needs."""
    static, keys = (tile, window, how), k.shape[-1]

    def of_piece(_, piece):
        q, first, ids = piece

        def add(number, carry):
            top, total, out = carry
            k_tile, v_tile = (_of_tile(x, number, tile) for x in (k, v))
            where = slopes, first, ids, kv_ids, number
            scores, _ = _tile_scores(*static, q, k_tile, *where)
            new = jnp.maximum(top, scores.max(axis=-1, keepdims=True))
            weights, fade = jnp.exp(scores - new), jnp.exp(top - new)
            values = jnp.einsum(
                "bkgts,bkhs->bkgth",
                weights.astype(v.dtype),
                v_tile,
                preferred_element_type=jnp.float32,
            )
            total = total * fade + weights.sum(axis=-1, keepdims=True)
            return new, total, out * fade + values

        none = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = none + MASKED, none, jnp.zeros(q.shape, jnp.float32)
        seen = _tiles(first, q.shape[3], keys, tile, window)
        top, total, out = jax.lax.fori_loop(*seen, add, start)
        return None, ((out / total).astype(q.dtype), top + jnp.log(total))

    _, found = jax.lax.scan(of_piece, None, (q, first, q_ids))
    out, normalizer = (checkpoint_name(x, KEPT) for x in found)
    return out, (q, k, v, slopes, first, q_ids, kv_ids, out, normalizer)


def _backward(tile, window, how, saved, d_out):
    q, k, v, slopes, first, q_ids, kv_ids, out, normalizer = saved
    # sum_s weights * d_weights, which the softmax's gradient subtracts.
    delta = jnp.sum(
        d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True
    )
    static, keys = (tile, window, how), k.shape[-1]

    def of_piece(carry, piece):
        q, first, ids, d_out, normalizer, delta = piece

        def add(number, carry):
            d_q, *d_kv = carry
            k_tile, v_tile = (_of_tile(x, number, tile) for x in (k, v))
            where = slopes, first, ids, kv_ids, number
            scores = _tile_scores(*static, q, k_tile, *where)
            given = q, k_tile, v_tile, d_out, normalizer, delta, scores, how
            more, *of_keys = tile_gradients(*given)
            d_kv = [
                jax.lax.dynamic_update_slice_in_dim(
                    x, _of_tile(x, number, tile) + y, number * tile, axis=-1
                )
                for x, y in zip(d_kv, of_keys, strict=True)
            ]
            return d_q + more, *d_kv

        seen = _tiles(first, q.shape[3], keys, tile, window)
        start = jnp.zeros(q.shape, jnp.float32), *carry
        d_q, *carry = jax.lax.fori_loop(*seen, add, start)
        return tuple(carry), d_q.astype(q.dtype)

    zeros = (jnp.zeros(k.shape, jnp.float32),) * 2
    pieces = q, first, q_ids, d_out, normalizer, delta
    (d_k, d_v), d_q = jax.lax.scan(of_piece, zeros, pieces)
    no = None, None, None, None  # slopes are no weights
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), *no


_attend.defvjp(_forward, _backward)
