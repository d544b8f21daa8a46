"""The pieces of a decoder block: projections, embedding, RMS norm, rotation, head.

Parameters are float32 and cast to the activation dtype where they are used; norms and
rotations compute in float32.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign.models import adapted, quantized
from jalign.models.config import ModelConfig, RopeScaling
from jalign.models.platform import PLAIN, PRODUCT, Platform
from jalign.sharding.groups import embedding_groups

INIT_STD = 0.02  # the initializer_range of every family here
_kernel_init = nn.initializers.normal(INIT_STD)


class Projection(nn.Module):
    """An einsum with a learned kernel, and a bias where bias_shape is given.

    The platform's einsum computes it. The kernel may be quantized (quantized.py), its
    codes cut over the mesh. Where there are adapters beside it (lora.py), theirs is
    added (adapted.py).
    """

    equation: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32
    platform: Platform = PLAIN
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        is_adapted = self.has_variable("params", "lora_a")
        y = self._adapted(x) if is_adapted else self._product(x)
        y = checkpoint_name(y, PRODUCT)
        if self.bias_shape is None:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape, jnp.float32)
        # Cast last: so its gradient, a sum over all tokens, adds up in float32.
        return y + jnp.broadcast_to(bias, y.shape).astype(self.dtype)

    def _product(self, x: jax.Array) -> jax.Array:
        x, leaves = x.astype(self.dtype), self.get_variable("params", "kernel")
        if isinstance(leaves, Mapping):
            how = self.platform, self.mesh, self.equation, self.shape
            return quantized.product(*how, x, dict(leaves))
        kernel = self.param("kernel", _kernel_init, self.shape, jnp.float32)
        return self.platform.einsum(self.equation, x, kernel.astype(self.dtype))

    def _adapted(self, x: jax.Array) -> jax.Array:
        """With s (x A) B added in float32; x there with dropout where asked for."""
        names = "kernel", "lora_a", "lora_b", "lora_scale"
        kernel, a, b, scale = (self.get_variable("params", name) for name in names)
        drops = self.has_variable("params", "lora_seed")
        seen = (self._dropped(x) if drops else x).astype(self.dtype)
        if not drops and adapted.pays_to_merge(self.platform, seen, kernel):
            return adapted.merged(self.equation, seen, kernel, a, b, scale)
        y = adapted.low_rank(self.platform, self.equation, seen, a, b)
        y = self._product(x).astype(jnp.float32) + scale * y.astype(jnp.float32)
        return y.astype(self.dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        """As lora.with_dropout has it."""
        names = "lora_seed", "lora_rate"
        seed, rate = (self.get_variable("params", name) for name in names)
        keep = 1 - jnp.asarray(rate)
        mask = jax.random.bernoulli(jax.random.key(jnp.asarray(seed)), keep, x.shape)
        return jnp.where(mask, x / keep, 0)


class Embedding(nn.Module):
    """Token table [V, D]. A token id outside [0, V) embeds to NaN, to be noticed."""

    vocab_size: int
    features: int
    dtype: DTypeLike = jnp.float32
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        shape = (self.vocab_size, self.features)
        table = self.param("embedding", _kernel_init, shape, jnp.float32)
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
    """x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467)."""

    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        scale = jnp.broadcast_to(scale.astype(jnp.float32), x.shape)
        return (normed * scale).astype(self.dtype)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Rotary angle per position of each pair of dimensions.

    Returns: float32 [H / 2] radians per token, and the factor on cos and sin.
    Source: RoFormer (arXiv:2104.09864) and the papers at RopeScaling.
    """
    H, scaling = config.head_dim, config.rope_scaling
    inv_freq = config.rope_theta ** -(np.arange(0, H, 2, dtype=np.float64) / H)
    factor = 1.0
    if scaling is not None and scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling is not None and scaling.kind == "llama3":
        inv_freq = _llama3_frequencies(inv_freq, scaling)
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


def rope_tables(
    config: ModelConfig, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles: int32 [B, T] -> 2 x float32 [B,T,H/2]."""
    inv_freq, factor = rope_frequencies(config)
    angles = jnp.einsum("bt,h->bth", positions.astype(jnp.float32), inv_freq)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2), Hugging Face's layout of the rotary embedding.

    Args:
      x: [B, T, heads, H], any float dtype.
      cos, sin: float32 [B, T, H/2].

    Returns: as x.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Head(NamedTuple):
    """From hidden states to logits: softcap(hidden @ unembed).

    Attributes:
      unembed: [D, V], in the parameters' dtype.
      softcap: c > 0 replaces each logit z by c tanh(z / c); None does not.
    """

    unembed: jax.Array
    softcap: float | None = None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], as `losses.token_logps` forms them."""
        unembed = self.unembed.astype(hidden.dtype)
        logits = jnp.matmul(hidden, unembed, preferred_element_type=jnp.float32)
        cap = self.softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
