"""The pieces of a decoder block: projections, embedding, norms, rotation, head.

Parameters are float32 and cast to the activation dtype where they are used; norms and
rotations compute in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign.models import quantized
from jalign.models.config import ModelConfig, RopeScaling
from jalign.models.platform import PLAIN, Platform
from jalign.sharding.groups import embedding_groups

INIT_STD = 0.02  # the initializer_range of every family here
kernel_init = nn.initializers.normal(INIT_STD)


class Projection(nn.Module):
    """An einsum with a learned kernel, and a bias where bias_shape is given.

    The platform's einsum computes it. The kernel may be quantized (quantized.py), its
    codes cut over the mesh. Where there are adapters beside it (lora.py), theirs is
    added.
    """

    equation: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32
    platform: Platform = PLAIN
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self._product(x.astype(self.dtype))
        if self.has_variable("params", "lora_a"):
            y = (y.astype(jnp.float32) + self._adapter(x)).astype(self.dtype)
        if self.bias_shape is None:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape, jnp.float32)
        # Cast last: so its gradient, a sum over all tokens, adds up in float32.
        return y + jnp.broadcast_to(bias, y.shape).astype(self.dtype)

    def _product(self, x: jax.Array) -> jax.Array:
        leaves = self.get_variable("params", "kernel")
        if isinstance(leaves, Mapping):
            how = self.platform, self.mesh, self.equation, self.shape
            return quantized.product(*how, x, dict(leaves))
        kernel = self.param("kernel", kernel_init, self.shape, jnp.float32)
        return self.platform.einsum(self.equation, x, kernel.astype(self.dtype))

    def _adapter(self, x: jax.Array) -> jax.Array:
        """s (x A) B in float32; x with dropout where lora.with_dropout asks for it."""

        def leaf(name: str) -> jax.Array:
            return jnp.asarray(self.get_variable("params", "lora_" + name))

        if self.has_variable("params", "lora_seed"):
            keep = 1 - leaf("rate")
            mask = jax.random.bernoulli(jax.random.key(leaf("seed")), keep, x.shape)
            x = jnp.where(mask, x / keep, 0)
        inputs, y_axes = self.equation.split("->")
        x_axes, kernel_axes = inputs.split(",")
        ins = "".join(axis for axis in kernel_axes if axis in x_axes)
        outs = "".join(axis for axis in kernel_axes if axis not in x_axes)
        low_axes = "".join(axis for axis in x_axes if axis not in ins) + "r"
        # Two products, never A B: that would be as large as the kernel.
        a, b = leaf("a").astype(self.dtype), leaf("b").astype(self.dtype)
        einsum = self.platform.einsum
        low = einsum(f"{x_axes},{ins}r->{low_axes}", x.astype(self.dtype), a)
        y = einsum(f"{low_axes},r{outs}->{y_axes}", low, b)
        return leaf("scale") * y.astype(jnp.float32)


class Embedding(nn.Module):
    """Token table [V, D]. A token id outside [0, V) embeds to NaN, to be noticed."""

    vocab_size: int
    features: int
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (self.vocab_size, self.features)
        table = self.param("embedding", kernel_init, shape, jnp.float32)
        return embed(self.mesh, self.dtype, table, tokens)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def embed(
    mesh: Mesh | None, dtype: DTypeLike, table: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Rows of a table: [V, D] and int [B, T] -> [B, T, D] in dtype, see Embedding.

    The table is cut over features, the rows over the batch. Each device takes its
    features of the tokens of its group, and the group's members exchange them.
    """
    # Cast first, so that the wire carries the narrower numbers.
    table = table if mesh is None else table.astype(dtype)
    return _rows(mesh, dtype, table, tokens)


@embed.defjvp
def _embed_jvp(mesh, dtype, primals, tangents):
    # The gradient adds up in float32, whatever the table's dtype: a token may stand in
    # half of the places, and bfloat16 stops growing after some hundred equal summands.
    table_dot = tangents[0].astype(jnp.float32)
    return embed(mesh, dtype, *primals), _rows(mesh, dtype, table_dot, primals[1])


def _rows(mesh: Mesh | None, dtype: DTypeLike, table: jax.Array, tokens: jax.Array):
    groups = embedding_groups(mesh, table.shape[1])
    if groups is not None:
        table = groups.place(table, "stored", "member")
        tokens = groups.place(tokens, "group")
    rows = (
        jnp.asarray(table)
        .at[tokens]
        .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    if groups is not None:
        rows = groups.place(rows, "group", None, "member")
    rows = rows.astype(dtype)
    return rows if groups is None else groups.place(rows, "batch")


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467).

    With `offset` it is (1 + scale), which starts from 0: so a float of few bits keeps
    what is learned, and weight decay pulls it to 1.
    """

    eps: float
    dtype: DTypeLike = jnp.float32
    offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, x.shape[-1:], jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
        return (normed * (scale + 1 if self.offset else scale)).astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * scale + bias over the last axis, in float32
    (arXiv:1607.06450); without the bias where there is none."""

    eps: float
    dtype: DTypeLike = jnp.float32
    with_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, ones = x.shape[-1:], nn.initializers.ones
        scale = self.param("scale", ones, size, jnp.float32).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(variance + self.eps) * jnp.broadcast_to(scale, x.shape)
        if self.with_bias:
            bias = self.param("bias", nn.initializers.zeros, size, jnp.float32)
            y = y + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
        return y.astype(self.dtype)


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


class Head(NamedTuple):
    """From hidden states to logits: softcap(inputs(hidden) @ unembed).

    Attributes:
      unembed: [D, V], in the parameters' dtype, scaled as logits are; with a bias
        [D + 1, V], its last row.
      softcap: c > 0 replaces each logit z by c tanh(z / c); None does not.
    """

    unembed: jax.Array
    softcap: float | None = None

    def inputs(self, hidden: jax.Array) -> jax.Array:
        """What `unembed` multiplies: hidden, and a 1 where there is a bias."""
        if self.unembed.shape[0] == hidden.shape[-1]:
            return hidden
        one = jnp.ones((*hidden.shape[:-1], 1), hidden.dtype)
        return jnp.concatenate([hidden, one], axis=-1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], as `losses.token_logps` forms them."""
        hidden = self.inputs(hidden)
        unembed = self.unembed.astype(hidden.dtype)
        logits = jnp.matmul(hidden, unembed, preferred_element_type=jnp.float32)
        cap = self.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
