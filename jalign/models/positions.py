"""How attention knows positions: rotary angles (RoPE), or a bias by distance (ALiBi).

Both compute in float32.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jalign.models.config import ModelConfig, RopeScaling


def alibi_slopes(config: ModelConfig) -> np.ndarray:
    """What a score loses for each token between query and key, float32 [N].

    Of M heads, a power of two, head i (from 1) has 2 ** (-alibi_max i / M). Of other
    numbers M is the next power, and the heads take slopes 2, 4, ..., then 1, 3, ....
    Source: Press et al. 2022 (arXiv:2108.12409), and its authors' code for these.
    """
    N = config.num_heads
    M = 1 << (N - 1).bit_length()
    slopes = 2.0 ** (-config.alibi_max * np.arange(1, M + 1) / M)
    if M != N:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])
    return slopes[:N].astype(np.float32)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Rotary angle per position of each pair of dimensions.

    Returns: float32 [R / 2] radians per token, R the dimensions that are rotated, and
      the factor on cos and sin; of longrope [2, R / 2], for short and long documents.
    Source: RoFormer (arXiv:2104.09864) and the papers at RopeScaling.
    """
    H, scaling = config.rotary_dim or config.head_dim, config.rope_scaling
    inv_freq = config.rope_theta ** -(np.arange(0, H, 2, dtype=np.float64) / H)
    factor = 1.0
    if scaling is not None and scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        inv_freq = _llama3_frequencies(inv_freq, scaling)
    elif scaling is not None and scaling.kind == "longrope":
        divisors = np.array([scaling.short_factors, scaling.long_factors])
        inv_freq, factor = inv_freq / divisors, _longrope_attention_factor(scaling)
    elif scaling is not None:
        inv_freq = _yarn_frequencies(inv_freq, scaling, config.rope_theta)
        factor = _yarn_attention_factor(scaling)
    return inv_freq.astype(np.float32), factor


def _llama3_frequencies(inv_freq: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between them."""
    turns = scaling.original_max_position * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * (keep + (1 - keep) / scaling.factor)


def _yarn_frequencies(
    inv_freq: np.ndarray, scaling: RopeScaling, theta: float
) -> np.ndarray:
    """As llama3, but the ramp is linear in the dimension instead of in the turns."""
    H = 2 * inv_freq.size

    def dimension_of(turns: float) -> float:
        length = scaling.original_max_position
        return H * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    # transformers' guard against a band of no width.
    width = high - low if high != low else 0.001
    stretch = np.clip((np.arange(H // 2) - low) / width, 0.0, 1.0)
    return inv_freq * (1 - stretch + stretch / scaling.factor)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        if scaling.factor <= 1:
            return 1.0
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _longrope_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    more = math.log(scaling.factor) / math.log(scaling.original_max_position)
    return math.sqrt(1 + more)


Rotation = tuple[jax.Array, jax.Array]
"""cos and sin of every position's angles: 2 x float32 [B, T, R/2]."""


def rope_tables(
    config: ModelConfig, positions: jax.Array, segment_ids: jax.Array | None = None
) -> dict[str, Rotation]:
    """LayerKind.rope -> the rotation of its layers.

    Args:
      config: whose layers they are.
      positions: int32 [B, T].
      segment_ids: int32 [B, T] or None: longrope goes by the length of each document.
    """
    if config.positions != "rope":
        return {}
    tables, asked = {}, {kind.rope for kind in config.kinds}
    if "main" in asked:
        inv_freq, factor = rope_frequencies(config)
        if inv_freq.ndim == 2:
            long = _in_long_document(config, positions, segment_ids)
            inv_freq = jnp.where(long[..., None], inv_freq[1], inv_freq[0])
        tables["main"] = _rotation(positions, inv_freq, factor)
    if "local" in asked:
        theta = config.local_rope_theta or config.rope_theta
        local = dataclasses.replace(config, rope_theta=theta, rope_scaling=None)
        tables["local"] = _rotation(positions, *rope_frequencies(local))
    return tables


def _rotation(positions: jax.Array, inv_freq, factor: float) -> Rotation:
    of_token = "bth" if inv_freq.ndim == 3 else "h"
    angles = jnp.einsum(f"bt,{of_token}->bth", positions.astype(jnp.float32), inv_freq)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _in_long_document(config: ModelConfig, positions, segment_ids) -> jax.Array:
    """Whether a token's document is longer than the pretrained length: bool [B, T]."""
    if segment_ids is None:
        segment_ids = jnp.zeros_like(positions)
    T = positions.shape[1]

    def last(position, ids):
        return jax.ops.segment_max(position, ids, num_segments=T + 1)[ids]

    assert config.rope_scaling is not None
    return jax.vmap(last)(positions, segment_ids) >= (
        config.rope_scaling.original_max_position
    )


def rotate(
    x: jax.Array, cos: jax.Array, sin: jax.Array, *, pairs: bool = False
) -> jax.Array:
    """Rotates the first dimensions of every head, in float32.

    Args:
      x: [B, T, heads, H], any float dtype.
      cos, sin: float32 [B, T, R/2]; dimensions from R on stay as they are.
      pairs: neighbours (2i, 2i + 1) are rotated, GPT-J's layout; else (i, i + R/2),
        Hugging Face's.

    Returns: as x.
    """
    R = 2 * cos.shape[-1]
    x32, rest = x[..., :R].astype(jnp.float32), x[..., R:]
    if pairs:
        first, second = x32[..., ::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if pairs:
        y = jnp.stack(rotated, axis=-1).reshape(x32.shape)
    else:
        y = jnp.concatenate(rotated, axis=-1)
    y = y.astype(x.dtype)
    return jnp.concatenate([y, rest], axis=-1) if rest.shape[-1] else y
