"""Splash attention on TPU: a Pallas kernel that skips masked blocks, on each shard."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jalign import sharding
from jalign.models.scores import PLAIN_SCORES, Scores
from jalign.sharding import context
from jalign.sharding.partition import activation_sharding

LANES = 128  # TPU vector width: lengths and the kernel's tiles are multiples of it
BLOCK = 512
_TILES = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
_TILES += ("block_q_dq", "block_kv_dq")
_QUERIES = "batch", None, "act_heads", None
_KEYS = "batch", None, "act_kv_heads", None


def splash_obstacle(length: int, scores: Scores, mesh: Mesh | None) -> str | None:
    """Why the kernel does not apply to rows of so many tokens, or None."""
    if scores.slopes:
        return "it has no ALiBi"
    if context.cuts_time(mesh, length):
        share = length // context.context_parts(mesh)
        if share % LANES:
            return f"a device's share of a row, {share} tokens, is no multiple of 128"
    return None


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    scores: Scores = PLAIN_SCORES,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """attention.attend for queries and keys of the same tokens, in order.

    Args:
      mesh: rows are cut over its data and fsdp axes, heads over tensor, and the queries
        of a row over context.
      interpret: run the kernel's logic without a TPU (slow; for tests).

    Raises: ValueError where the kernel does not apply.
    """
    obstacle = splash_obstacle(q.shape[1], scores, mesh)
    if obstacle is not None:
        raise ValueError(f"attention='splash' does not apply: {obstacle}")
    k, v = with_enough_heads(q, k, v, mesh)
    how = dict(window=sliding_window, scores=scores, interpret=interpret)
    if mesh is not None and context.cuts_time(mesh, q.shape[1]):
        return _on_context(q, k, v, segment_ids, mesh, **how)
    in_axes, args = [_QUERIES, _KEYS, _KEYS], [q, k, v]
    if segment_ids is not None:
        in_axes.append(("batch", None))
        args.append(segment_ids)
    return sharding.shard_map(partial(_splash, **how), mesh, in_axes, _QUERIES)(*args)


def with_enough_heads(q, k, v, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Keys and values with as many heads as queries where `tensor` does not divide
    theirs: query and kv heads must be cut alike."""
    if mesh is None or k.shape[2] % mesh.shape["tensor"] == 0:
        return k, v
    groups = q.shape[2] // k.shape[2]
    return jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)


def _splash(q, k, v, segment_ids=None, *, window, scores, interpret):
    T, N, H = q.shape[1:]
    # Zero keys behind the last token are invisible to it, so padding is harmless.
    # Above a block, to whole blocks; below, to whole lanes.
    pad = -T % (BLOCK if T > BLOCK else LANES)
    lengths = ((0, 0), (0, pad), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, lengths).transpose(0, 2, 1, 3) for x in (q, k, v))
    block = min(BLOCK, T + pad)
    kernel = _kernel(N, _mask(T + pad, window), block, scores, interpret)
    q = q * jnp.asarray(scores.factor(H), q.dtype)
    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
    out = _of_rows(kernel, q, k, v, ids, ids)
    return out.transpose(0, 2, 1, 3)[:, :T].astype(q.dtype)


def _on_context(q, k, v, segment_ids, mesh: Mesh, *, window, scores, interpret):
    """Each device's share of the queries, dealt in balance, and all keys of the row."""
    T, N, H = q.shape[1:]
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    parts = context.context_parts(mesh)
    mask = _mask(T, window)
    mask.q_sequence = context.dealt_order(mesh, T)
    place = activation_sharding(mesh, (N, T), "act_heads", "time")
    shards = N // place.shard_shape((N, T))[0], parts
    block = math.gcd(BLOCK, T // parts)
    kernel = _kernel(N, mask, block, scores, interpret, shards)

    def local(kernel, q, k, v, q_ids, kv_ids):
        q, q_ids = context.deal(q), context.deal(q_ids)
        k, v = context.gather_time(k), context.gather_time(v)
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        q = q * jnp.asarray(scores.factor(H), q.dtype)
        out = _of_rows(kernel, q, k, v, q_ids, kv_ids)
        return context.undeal(out.transpose(0, 2, 1, 3).astype(q.dtype))

    queries, keys = (("batch", "time", *axes[2:]) for axes in (_QUERIES, _KEYS))
    in_axes = [kernel.manual_sharding_spec(place), queries, keys, keys]
    in_axes += [("batch", "time"), ("batch", None)]
    fn = sharding.shard_map(local, mesh, in_axes, queries)
    return fn(kernel, q, k, v, segment_ids, segment_ids)


def _mask(length: int, window: int | None) -> Any:
    """That of one head, of queries in order."""
    # Imported here: the module builds tables that only TPU users pay for.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if window is None:
        return splash.CausalMask(shape)
    return splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)


def _kernel(
    heads: int, mask, block: int, scores: Scores, interpret: bool, shards=(1, 1)
) -> Any:
    """Of queries whose heads and time are cut into so many shards."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(_TILES, block)),
        attn_logits_soft_cap=scores.softcap,
        interpret=interpret,
        head_shards=shards[0],
        q_seq_shards=shards[1],
    )


def _of_rows(kernel, q, k, v, q_ids, kv_ids) -> jax.Array:
    """The kernel, row by row: [B, N, T, H], [B, K, S, H], and ids or None."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if q_ids is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(kernel)(q, k, v, splash.SegmentIds(q_ids, kv_ids))
