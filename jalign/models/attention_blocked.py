"""Causal attention by query blocks: no [T, T] array, and masked blocks are skipped.

The loop over query blocks is unrolled, so each block multiplies only with the keys that
causality and the window leave it: half the work of a full score matrix. The backward
pass recomputes the weights of a block from the saved log-normalizers, as in
FlashAttention (arXiv:2205.14135). In long rows a block goes piece by piece, so that
memory grows with T and not with T^2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jalign.models.platform import KEPT
from jalign.models.scores import PLAIN_SCORES, Scores, masked_scores

PIECE, MAX_BLOCKS = 128, 16


class Span(NamedTuple):
    """A block of queries and the keys that they may see.

    Attributes:
      start, end: its queries.
      first_key: its keys begin here and end with the queries.
      pieces: equal parts of which one at a time has its scores in memory.
    """

    start: int
    end: int
    first_key: int
    pieces: int


def block_spans(
    length: int, window: int | None, block: int | None = None, piece: int = PIECE
) -> tuple[Span, ...]:
    """The blocks of a row.

    Args:
      length: T.
      window: sliding window in tokens, or None.
      block: queries a block, a multiple of piece or less; by default one piece, or
        more where that makes over 16 blocks.
      piece: queries whose scores are in memory at once.
    """
    if block is None:
        block = max(piece, -(-length // (MAX_BLOCKS * piece)) * piece)
    spans, start = [], 0
    while start < length:
        size = min(block, length - start)
        if size > piece:
            size -= size % piece  # what is left over is a block of its own
        first_key = 0 if window is None else max(0, start - window + 1)
        pieces = max(1, size // piece)
        spans.append(Span(start, start + size, first_key, pieces))
        start += size
    return tuple(spans)


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    scores: Scores = PLAIN_SCORES,
    block: int | None = None,
    piece: int = PIECE,
    heads: int | None = None,
) -> jax.Array:
    """attention.attend for queries and keys of the same tokens, in order.

    Args:
      q: [B, T, N, H].
      k, v: [B, T, K, H].
      segment_ids: int32 [B, T] or None.
      sliding_window: tokens, or None.
      scores: scale, bias and cap.
      block, piece: see `block_spans`.
      heads: kv heads that are gone through at once, a divisor of K; None for all.

    Returns: [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads outside, a kv head's queries together: each product is a plain matmul.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 3, 1)
    spans = block_spans(T, sliding_window, block, piece)

    def some_heads(qkv):
        return _blocked(spans, sliding_window, scores, *qkv, segment_ids)

    by_heads = (q, k, v, scores.of_heads(K))
    if heads in (None, K):
        out: jax.Array = some_heads(by_heads)  # pyright: ignore[reportAssignmentType]
    else:
        parts = jax.tree.map(lambda x: _split_heads(x, heads), by_heads)
        out = jnp.moveaxis(jax.lax.map(some_heads, parts), 0, 1).reshape(q.shape)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def heads_in_cache(q: jax.Array, k: jax.Array, cache: int, piece: int = PIECE) -> int:
    """kv heads of which the scores of a piece [B, heads * G, t, T] fit a cache, bytes.

    Each score is read and written some ten times; from memory that takes longer than
    the products. Shapes as of `blocked_attention`; a divisor of K.
    """
    B, T, N, _ = q.shape
    K = k.shape[2]
    bytes_a_head = 4 * B * (N // K) * min(piece, T) * T
    fit = max(1, cache // bytes_a_head)
    return next(n for n in range(min(fit, K), 0, -1) if K % n == 0)


def _split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, K, ...] -> [K / heads, B, heads, ...]."""
    x = x.reshape(x.shape[0], -1, heads, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _over_pieces(span: Span, body: Callable, carry: Any) -> tuple[Any, Any]:
    """lax.scan of body(carry, first query) over a span's pieces -> (carry, outputs).

    Args:
      body: gives (carry, arrays [B, K, G, t, ...]), which are joined along t.
    """
    size = (span.end - span.start) // span.pieces
    if span.pieces == 1:
        return body(carry, span.start)
    starts = span.start + size * jnp.arange(span.pieces)
    carry, outs = jax.lax.scan(body, carry, starts)

    def join(x):  # [pieces, B, K, G, t, ...] -> [B, K, G, pieces * t, ...]
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], -1, *x.shape[5:])

    return carry, jax.tree.map(join, outs)


def _rows(x: jax.Array, start, span: Span, axis: int = 3) -> jax.Array:
    """The queries of a piece out of all."""
    size = (span.end - span.start) // span.pieces
    if span.pieces == 1:
        return jax.lax.slice_in_dim(x, span.start, span.end, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _scores(q, k, slopes, segment_ids, start, span: Span, window, how: Scores):
    """`masked_scores` of a piece q [B,K,G,t,H] with a span's keys."""
    if span.pieces > 1:
        # Tied to q, for jax takes what depends on no weight out of all loops: the masks
        # of all pieces, T^2 numbers.
        start, q = jax.lax.optimization_barrier((start, q))
    queries = (start + jnp.arange(q.shape[3])).astype(jnp.float32)
    keys = jnp.arange(span.first_key, span.end, dtype=jnp.float32)
    if segment_ids is not None:
        ids = segment_ids.astype(jnp.float32)
        of_keys = ids[:, span.first_key : span.end]
        segment_ids = _rows(ids, start, span, axis=1), of_keys
    return masked_scores(q, k, slopes, queries, keys, segment_ids, window, how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked(spans, window, how, q, k, v, slopes, segment_ids):
    return _forward(spans, window, how, q, k, v, slopes, segment_ids)[0]


def _forward(spans, window, how, q, k, v, slopes, segment_ids):
    """q [B,K,G,T,H], k and v [B,K,T,H] -> out as q, and what the backward needs."""
    outs = []
    for span in spans:
        keys = slice(span.first_key, span.end)
        attend = functools.partial(
            _attend_piece,
            *(q, k[..., keys], v[..., keys]),
            *(slopes, segment_ids, span, window, how),
        )
        outs.append(_over_pieces(span, attend, None)[1])
    out, normalizer = (
        checkpoint_name(jnp.concatenate(x, axis=3), KEPT)
        for x in zip(*outs, strict=True)
    )
    return out, (q, k, v, slopes, segment_ids, out, normalizer)


def _attend_piece(q, k, v, slopes, segment_ids, span, window, how, carry, start):
    """-> (carry, (out [B,K,G,t,H], log-normalizers [B,K,G,t,1]))."""
    rows = _rows(q, start, span)
    scores, _ = _scores(rows, k, slopes, segment_ids, start, span, window, how)
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgts,bkhs->bkgth",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return carry, ((out / total).astype(q.dtype), top + jnp.log(total))


def _backward(spans, window, how, saved, d_out):
    q, k, v, slopes, segment_ids, out, normalizer = saved
    # sum_s weights * d_weights, which the softmax's gradient subtracts.
    delta = jnp.einsum(
        "bkgth,bkgth->bkgt", d_out, out, preferred_element_type=jnp.float32
    )[..., None]
    # [B,K,H,T]: so the narrow side of the products is transposed, not the scores.
    d_q, d_kv = [], (jnp.zeros(k.shape, jnp.float32),) * 2
    for span in spans:
        keys = slice(span.first_key, span.end)
        piece = functools.partial(
            _piece_gradients,
            *(q, k[..., keys], v[..., keys], d_out, normalizer, delta),
            *(slopes, segment_ids, span, window, how),
        )
        zeros = tuple(jnp.zeros_like(x[..., keys]) for x in d_kv)
        added, d_block = _over_pieces(span, piece, zeros)
        d_q.append(d_block)
        d_kv = tuple(x.at[..., keys].add(y) for x, y in zip(d_kv, added, strict=True))
    d_q = jnp.concatenate(d_q, axis=3).astype(q.dtype)
    return d_q, d_kv[0].astype(k.dtype), d_kv[1].astype(v.dtype), None, None


def _piece_gradients(
    q,
    k,
    v,
    d_out,
    normalizer,
    delta,
    slopes,
    segment_ids,
    span,
    window,
    how,
    carry,
    start,
):
    """carry (d_k, d_v) [B,K,H,s] of a span's keys -> (carry, d_q [B,K,G,t,H])."""
    q, *rest = (_rows(x, start, span) for x in (q, d_out, normalizer, delta))
    scores = _scores(q, k, slopes, segment_ids, start, span, window, how)
    d_q, d_k, d_v = tile_gradients(q, k, v, *rest, scores, how)
    return (carry[0] + d_k, carry[1] + d_v), d_q


def tile_gradients(q, k, v, d_out, normalizer, delta, both_scores, how: Scores):
    """What queries [B,K,G,t,H] and keys [B,K,H,s] give to the gradients of q, k and v,
    float32; both_scores: of `masked_scores`."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores, unmasked = both_scores
    weights = jnp.exp(scores - normalizer)
    d_weights = einsum("bkgth,bkhs->bkgts", d_out, v)
    d_scores = how.scaled(weights * (d_weights - delta), q.shape[-1])
    if how.softcap is not None:
        d_scores *= 1 - jnp.square(unmasked / how.softcap)
    d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
    d_k = einsum("bkgth,bkgts->bkhs", q, d_scores)
    d_v = einsum("bkgth,bkgts->bkhs", d_out, weights)
    return einsum("bkgts,bkhs->bkgth", d_scores, k), d_k, d_v


_blocked.defvjp(_forward, _backward)
