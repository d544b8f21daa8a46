"""Causal attention by query blocks: no [T, T] array, and masked blocks are skipped.

The loop over query blocks is unrolled, so each block multiplies only with the keys that
causality and the window leave it: half the work of a full score matrix. The backward
pass recomputes the weights of a block from the saved log-normalizers, as in
FlashAttention (arXiv:2205.14135).
"""

import functools
import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a fully masked row gives no NaN
MIN_BLOCK, MAX_BLOCKS = 128, 16


def block_ranges(
    length: int, window: int | None, block: int | None = None
) -> list[tuple[int, int, int]]:
    """(first query, end, first key) of each query block; its keys end with it.

    Args:
      length: T.
      window: sliding window in tokens, or None.
      block: queries a block; by default 128, or more where that makes over 16 blocks.
    """
    if block is None:
        block = max(MIN_BLOCK, -(-length // (MAX_BLOCKS * MIN_BLOCK)) * MIN_BLOCK)
    ranges = []
    for start in range(0, length, block):
        first_key = 0 if window is None else max(0, start - window + 1)
        ranges.append((start, min(start + block, length), first_key))
    return ranges


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    block: int | None = None,
) -> jax.Array:
    """attention.attend for queries and keys of the same tokens, in order.

    Args:
      q: [B, T, N, H].
      k, v: [B, T, K, H].
      segment_ids: int32 [B, T] or None.
      sliding_window: tokens, or None.
      block: queries a block, see `block_ranges`.

    Returns: [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    # Heads outside, a kv head's queries together: each product is a plain matmul.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    ranges = tuple(block_ranges(T, sliding_window, block))
    out: jax.Array = _blocked(ranges, sliding_window, q, k, v, segment_ids)  # pyright: ignore[reportAssignmentType]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _weighted_scores(q, k, segment_ids, span, window):
    """Masked float32 scores [B,K,G,t,s] of one block, and its query and key slices."""
    start, end, first_key = span
    queries, keys = slice(start, end), slice(first_key, end)
    scale = 1 / math.sqrt(q.shape[-1])
    scores = scale * jnp.einsum(
        "bkgth,bksh->bkgts",
        q[:, :, :, queries],
        k[:, :, keys],
        preferred_element_type=jnp.float32,
    )
    distance = jnp.arange(start, end)[:, None] - jnp.arange(first_key, end)[None, :]
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[None]
    if segment_ids is not None:
        same = segment_ids[:, queries, None] == segment_ids[:, None, keys]
        mask = jnp.broadcast_to(mask, same.shape) & same
    return jnp.where(mask[:, None, None], scores, MASKED), queries, keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(ranges, window, q, k, v, segment_ids):
    return _forward(ranges, window, q, k, v, segment_ids)[0]


def _forward(ranges, window, q, k, v, segment_ids):
    """q [B,K,G,T,H], k and v [B,K,T,H] -> out as q, and what the backward needs."""
    outs, normalizers = [], []
    for span in ranges:
        scores, _, keys = _weighted_scores(q, k, segment_ids, span, window)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum(
            "bkgts,bksh->bkgth",
            weights.astype(v.dtype),
            v[:, :, keys],
            preferred_element_type=jnp.float32,
        )
        outs.append((out / total).astype(q.dtype))
        normalizers.append(top + jnp.log(total))
    out = jnp.concatenate(outs, axis=3)
    normalizer = jnp.concatenate(normalizers, axis=3)
    return out, (q, k, v, segment_ids, out, normalizer)


def _backward(ranges, window, saved, d_out):
    q, k, v, segment_ids, out, normalizer = saved
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale = 1 / math.sqrt(q.shape[-1])
    # sum_s weights * d_weights, which the softmax's gradient subtracts.
    delta = einsum("bkgth,bkgth->bkgt", d_out, out)[..., None]
    d_q = []
    # [B,K,H,T]: so the narrow side of the products is transposed, not the scores.
    B, K, T, H = k.shape
    d_k = d_v = jnp.zeros((B, K, H, T), jnp.float32)
    for span in ranges:
        scores, queries, keys = _weighted_scores(q, k, segment_ids, span, window)
        weights = jnp.exp(scores - normalizer[:, :, :, queries])
        d_block = d_out[:, :, :, queries]
        d_weights = einsum("bkgth,bksh->bkgts", d_block, v[:, :, keys])
        d_scores = scale * weights * (d_weights - delta[:, :, :, queries])
        d_scores, weights = d_scores.astype(q.dtype), weights.astype(q.dtype)
        d_q.append(einsum("bkgts,bksh->bkgth", d_scores, k[:, :, keys]))
        block_q = q[:, :, :, queries]
        d_k = d_k.at[..., keys].add(einsum("bkgth,bkgts->bkhs", block_q, d_scores))
        d_v = d_v.at[..., keys].add(einsum("bkgth,bkgts->bkhs", d_block, weights))
    d_q = jnp.concatenate(d_q, axis=3).astype(q.dtype)
    d_k, d_v = d_k.astype(k.dtype).mT, d_v.astype(v.dtype).mT
    return d_q, d_k, d_v, None


_blocked.defvjp(_forward, _backward)
