"""Attention behind one function, `attend`, and the plain path that defines it."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jalign.models.attention_blocked import (
    MASKED,
    blocked_attention,
    heads_in_cache,
)
from jalign.models.attention_kernels import (
    cudnn_attention,
    cudnn_obstacle,
    splash_attention,
)

IMPLEMENTATIONS = ("auto", "plain", "blocked", "cudnn", "splash")
# Below this many query x key pairs a row, the score matrix is small enough to keep.
PLAIN_UP_TO = 64 * 64


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
    implementation: str = "auto",
    in_order: bool | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal grouped-query attention, softmax(q k / sqrt(H)) v.

    A query sees the keys of its own segment whose position is at most its own, and,
    with a sliding window, more than its own minus the window.

    Args:
      q: [B, T, N, H], any float dtype; the softmax is float32.
      k, v: [B, S, K, H]; query head n reads kv head n // (N / K).
      q_positions, kv_positions: int32 [B, T] and [B, S].
      q_segment_ids, kv_segment_ids: int32 [B, T] and [B, S], or both None: every row
        is one document.
      sliding_window: tokens, or None.
      implementation: "plain" keeps all scores; "blocked" none of them, skips key
        blocks that causality or the window masks, and recomputes in the backward
        pass; "cudnn" and "splash" are kernels for GPU and TPU. "auto" takes the
        kernel of the platform where it applies, else blocked for long rows, else
        plain.
      in_order: whether keys and queries are the same T tokens, and positions within
        a segment count up by one, as in training; T == S when None. All paths but
        plain need it. Outputs at padding (segment 0) are then unspecified but finite.
      mesh: of the arrays, for the kernels.

    Returns: [B, T, N, H] in q's dtype.
    Raises: ValueError where the implementation asked for does not apply.
    """
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids belong together")
    if in_order is None:
        in_order = q.shape[1] == k.shape[1]
    if implementation == "auto":
        implementation = _choose(q, k, q_segment_ids, in_order, platform_of(mesh))
    elif not in_order:
        implementation = "plain"  # decoding: a kernel for training has no say here
    if implementation == "plain":
        mask = attention_mask(
            q_positions, kv_positions, q_segment_ids, kv_segment_ids, sliding_window
        )
        one = q.shape[1] == 1 and platform_of(mesh) == "cpu"
        return (one_query_attention if one else plain_attention)(q, k, v, mask)
    if implementation == "blocked":
        alone = mesh is None and platform_of(mesh) == "cpu"
        heads = heads_in_cache(q, k) if alone else None
        return blocked_attention(q, k, v, q_segment_ids, sliding_window, heads=heads)
    if implementation == "cudnn":
        return cudnn_attention(q, k, v, q_segment_ids, sliding_window)
    if implementation == "splash":
        interpret = platform_of(mesh) != "tpu"
        return splash_attention(
            q, k, v, q_segment_ids, sliding_window, mesh=mesh, interpret=interpret
        )
    raise ValueError(f"implementation={implementation!r} is not in {IMPLEMENTATIONS}")


def platform_of(mesh: Mesh | None) -> str:
    """Where arrays of this mesh live: "cpu", "gpu" or "tpu"."""
    # A mesh may stand for a machine that is not here, as `jalign plan` has it.
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def _choose(q, k, segment_ids, in_order: bool, platform: str) -> str:
    if not in_order:
        return "plain"
    if platform == "tpu":
        return "splash"
    if platform in ("gpu", "cuda") and cudnn_obstacle(q, k, segment_ids) is None:
        return "cudnn"
    return "plain" if q.shape[1] * k.shape[1] <= PLAIN_UP_TO else "blocked"


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
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """The definition: all scores at once. Shapes as of `attend`, mask bool [B, T, S].

    Returns: [B, T, N, H] in q's dtype; a query that sees nothing gets the mean value.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores / math.sqrt(H), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def one_query_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """`plain_attention` for T = 1, as sums: small products of matrices cost more."""
    B, _, N, H = q.shape
    K, dtype = k.shape[2], q.dtype
    q = q.reshape(B, K, N // K, H, 1).astype(jnp.float32)
    k = k.transpose(0, 2, 3, 1)[:, :, None].astype(jnp.float32)
    v = v.transpose(0, 2, 1, 3)[:, :, None].astype(jnp.float32)
    scores = jnp.sum(q * k, axis=-2)
    scores = jnp.where(mask[:, None], scores / math.sqrt(H), MASKED)
    weights = jax.nn.softmax(scores, axis=-1)[..., None]
    return jnp.sum(weights * v, axis=-2).reshape(B, 1, N, H).astype(dtype)
