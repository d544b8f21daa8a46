"""Attention behind one function, `attend`: the plain path defines it, kernels follow.

The kernels, cuDNN on GPU and splash on TPU, and the blocked path take queries and keys
of the same tokens in order. On a context axis a device has some of the queries only.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jalign import sharding
from jalign.models.attention_blocked import blocked_attention, heads_in_cache
from jalign.models.attention_context import context_attention
from jalign.models.attention_splash import splash_attention, splash_obstacle
from jalign.models.platform import Platform, platform_of
from jalign.models.scores import MASKED, PLAIN_SCORES, Scores
from jalign.sharding.context import cuts_time

IMPLEMENTATIONS = ("auto", "plain", "blocked", "cudnn", "splash")
# Below this many query x key pairs a row, the score matrix is small enough to keep.
PLAIN_UP_TO = 64 * 64
# cuDNN takes segments only as a bias [B, 1, T, T]; beyond this length that is too much.
CUDNN_SEGMENTS_UP_TO = 4096


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    sliding_window: int | None = None,
    scores: Scores = PLAIN_SCORES,
    implementation: str = "auto",
    in_order: bool | None = None,
    mesh: Mesh | None = None,
    platform: Platform | None = None,
) -> jax.Array:
    """Causal grouped-query attention, softmax(scores of q k) v.

    A query sees the keys of its own segment whose position is at most its own, and,
    with a sliding window, more than its own minus the window.

    Args:
      q: [B, T, N, H], any float dtype; the softmax is float32.
      k, v: [B, S, K, H]; query head n reads kv head n // (N / K).
      q_positions, kv_positions: int32 [B, T] and [B, S].
      q_segment_ids, kv_segment_ids: int32 [B, T] and [B, S], or both None: every row
        is one document.
      sliding_window: tokens, or None.
      scores: scale, bias and cap; by default q k / sqrt(H).
      implementation: "plain" keeps all scores; "blocked" none of them, skips key
        blocks that causality or the window masks, and recomputes in the backward
        pass; "cudnn" and "splash" are kernels for GPU and TPU. "auto" takes the
        kernel of the platform where it applies, else blocked for long rows, else
        plain.
      in_order: whether keys and queries are the same T tokens, and positions within
        a segment count up by one, as in training; T == S when None. All paths but
        plain need it. Outputs at padding (segment 0) are then unspecified but finite.
      mesh: of the arrays, for the kernels.
      platform: what is best where the arrays are; None: that of the mesh's devices.

    Returns: [B, T, N, H] in q's dtype.
    Raises: ValueError where the implementation asked for does not apply.
    """
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids belong together")
    if in_order is None:
        in_order = q.shape[1] == k.shape[1]
    platform = platform_of(mesh) if platform is None else platform
    if not in_order or scores.plain_only:
        implementation = "plain"  # decoding: a kernel for training has no say here
    elif implementation == "auto":
        best = platform.attention
        implementation = _choose(q, k, q_segment_ids, best, scores, mesh)
    on_context = in_order and cuts_time(mesh, q.shape[1])
    if implementation == "plain":
        if on_context:
            whole = "batch", None, "act_kv_heads", None
            k, v = (sharding.constrain(x, mesh, *whole) for x in (k, v))
        mask = attention_mask(
            q_positions, kv_positions, q_segment_ids, kv_segment_ids, sliding_window
        )
        one = q.shape[1] == 1 and platform.one_query_sums
        how = scores, q_positions, kv_positions
        return (one_query_attention if one else plain_attention)(q, k, v, mask, *how)
    qkv = q, k, v, q_segment_ids, sliding_window, scores
    if implementation == "splash":
        return splash_attention(*qkv, mesh=mesh, interpret=platform.interpret)
    if implementation == "blocked" and mesh is not None and on_context:
        return context_attention(*qkv, mesh=mesh)
    if implementation == "blocked":
        size = platform.scores_bytes if mesh is None else None
        heads = None if size is None else heads_in_cache(q, k, size)
        return blocked_attention(*qkv, heads=heads)
    if implementation == "cudnn" and on_context:
        raise ValueError("attention='cudnn' does not apply to a mesh with context > 1")
    if implementation == "cudnn":
        return cudnn_attention(*qkv)
    raise ValueError(f"implementation={implementation!r} is not in {IMPLEMENTATIONS}")


def _choose(q, k, segment_ids, best: str, scores: Scores, mesh: Mesh | None) -> str:
    """What "auto" is for tokens in order, where `best` is best for long rows."""
    obstacle = None
    if best == "cudnn" and cuts_time(mesh, q.shape[1]):
        obstacle = "it wants the queries of all its keys"
    elif best == "cudnn":
        obstacle = cudnn_obstacle(q, k, segment_ids, scores)
    elif best == "splash":
        obstacle = splash_obstacle(q.shape[1], scores, mesh)
    best = best if obstacle is None else "blocked"
    short = q.shape[1] * k.shape[1] <= PLAIN_UP_TO
    return "plain" if best == "blocked" and short else best


def attention_mask(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    sliding_window: int | None,
) -> jax.Array:
    """bool [B, T, S], True where a query sees a key; arguments as of `attend`."""
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = distance >= 0
    if sliding_window is not None:
        mask &= distance < sliding_window
    if q_segment_ids is not None and kv_segment_ids is not None:
        mask &= q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    return mask


def plain_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scores: Scores = PLAIN_SCORES,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
) -> jax.Array:
    """The definition: all scores at once. Shapes as of `attend`, mask bool [B, T, S].

    Returns: [B, T, N, H] in q's dtype; a query that sees nothing gets the mean value.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    products = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    unmasked = scores.of(products, H, q_positions, kv_positions)
    masked = jnp.where(mask[:, None, None], unmasked, MASKED)
    weights = jax.nn.softmax(masked, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def one_query_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scores: Scores = PLAIN_SCORES,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
) -> jax.Array:
    """`plain_attention` for T = 1, as sums: small products of matrices cost more."""
    B, _, N, H = q.shape
    K, dtype = k.shape[2], q.dtype
    q = q.reshape(B, K, N // K, H, 1).astype(jnp.float32)
    k = k.transpose(0, 2, 3, 1)[:, :, None].astype(jnp.float32)
    v = v.transpose(0, 2, 1, 3)[:, :, None].astype(jnp.float32)
    products = jnp.sum(q * k, axis=-2)[..., None, :]  # [B, K, G, 1, S]
    unmasked = scores.of(products, H, q_positions, kv_positions)[..., 0, :]
    weights = jax.nn.softmax(jnp.where(mask[:, None], unmasked, MASKED), axis=-1)
    weights = weights[..., None]
    return jnp.sum(weights * v, axis=-2).reshape(B, 1, N, H).astype(dtype)


def cudnn_obstacle(
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
    scores: Scores = PLAIN_SCORES,
) -> str | None:
    """Why cuDNN's fused attention does not apply, or None.

    Source: jax 0.10's checks in jax/_src/cudnn/fused_attention_stablehlo.py; a head
    dim of 256 needs a Hopper GPU, and the limit here is that of the older ones.
    """
    T, H = q.shape[1], q.shape[-1]
    if scores.softcap is not None or scores.slopes:
        return "it has no softcap and no ALiBi"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"dtype {q.dtype} is not bfloat16 or float16"
    if H > 128 or H % 8:
        return f"head dim {H} is not a multiple of 8 up to 128"
    if segment_ids is not None and (T % 2 or T > CUDNN_SEGMENTS_UP_TO):
        return f"segments need an even length up to {CUDNN_SEGMENTS_UP_TO}, not {T}"
    return None


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    scores: Scores = PLAIN_SCORES,
) -> jax.Array:
    """cuDNN's flash attention through jax.nn. Raises ValueError where it cannot."""
    obstacle = cudnn_obstacle(q, k, segment_ids, scores)
    if obstacle is not None:
        raise ValueError(f"attention='cudnn' does not apply: {obstacle}")
    mask = None
    if segment_ids is not None:
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    window = None if sliding_window is None else (sliding_window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=True,
        scale=scores.scale,
        local_window_size=window,
        implementation="cudnn",
    )
