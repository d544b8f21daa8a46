"""Attention by vendor kernels: cuDNN on GPU, splash on TPU.

Both take queries and keys of the same tokens in order; shapes as of attention.attend.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jalign import sharding

LANES = 128  # TPU vector width: lengths and splash's tiles are multiples of it
SPLASH_BLOCK = 512
# cuDNN takes segments only as a bias [B, 1, T, T]; beyond this length that is too much.
CUDNN_SEGMENTS_UP_TO = 4096


def cudnn_obstacle(
    q: jax.Array, k: jax.Array, segment_ids: jax.Array | None
) -> str | None:
    """Why cuDNN's fused attention does not apply, or None.

    Source: jax 0.10's checks in jax/_src/cudnn/fused_attention_stablehlo.py; a head
    dim of 256 needs a Hopper GPU, and the limit here is that of the older ones.
    """
    T, H = q.shape[1], q.shape[-1]
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
) -> jax.Array:
    """cuDNN's flash attention through jax.nn. Raises ValueError where it cannot."""
    obstacle = cudnn_obstacle(q, k, segment_ids)
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
        local_window_size=window,
        implementation="cudnn",
    )


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    sliding_window: int | None,
    *,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, a Pallas kernel that skips masked blocks, on each shard.

    Args:
      mesh: rows are cut over its data and fsdp axes, heads over tensor.
      interpret: run the kernel's logic without a TPU (slow; for tests).
    """
    if mesh is not None and k.shape[2] % mesh.shape["tensor"]:
        # Query and kv heads must be cut alike; where kv heads are too few, repeat.
        groups = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    axes = ("batch", "time", "act_heads", None)
    kv_axes = ("batch", "time", "act_kv_heads", None)
    in_axes, args = [axes, kv_axes, kv_axes], [q, k, v]
    if segment_ids is not None:
        in_axes.append(("batch", "time"))
        args.append(segment_ids)
    fn = functools.partial(_splash, window=sliding_window, interpret=interpret)
    return sharding.shard_map(fn, mesh, in_axes, axes)(*args)


def _splash(q, k, v, segment_ids=None, *, window, interpret):
    # Imported here: the module builds tables that only TPU users pay for.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N, H = q.shape[1:]
    # Zero keys behind the last token are invisible to it, so padding is harmless.
    # Above a block, to whole blocks; below, to whole lanes.
    tile = SPLASH_BLOCK if T > SPLASH_BLOCK else LANES
    pad = -T % tile
    lengths = ((0, 0), (0, pad), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, lengths).transpose(0, 2, 1, 3) for x in (q, k, v))
    shape = (T + pad, T + pad)
    mask = splash.CausalMask(shape)
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = min(SPLASH_BLOCK, T + pad)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    q = q * jnp.asarray(H**-0.5, q.dtype)
    if segment_ids is None:
        out: Any = jax.vmap(kernel)(q, k, v)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, pad)))
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))
    return out.transpose(0, 2, 1, 3)[:, :T].astype(q.dtype)
