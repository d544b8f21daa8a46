"""The pieces of a decoder block: projections, embedding, norms, head.

Parameters are float32 and cast to the activation dtype where they are used; norms
compute in float32.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import adapted, quantized
from jalign.models.platform import PLAIN, PRODUCT, Platform
from jalign.sharding.context import rows_to_time, time_to_rows
from jalign.sharding.groups import embedding_groups

INIT_STD = 0.02  # the initializer_range of every family here
kernel_init = nn.initializers.normal(INIT_STD)


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
    own: Callable[[jax.Array], jax.Array] = lambda kernel: kernel  # of How

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
        kernel = self.param("kernel", kernel_init, self.shape, jnp.float32)
        most = self.platform.reduced_in_one
        einsum = sharding.staged(self.platform.einsum, self.mesh, most)
        return einsum(self.equation, x, self.own(kernel).astype(self.dtype))

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
    batch = tokens.shape[0]
    if groups is not None:
        table = groups.place(table, "stored", "member")
        tokens = groups.place(time_to_rows(tokens, mesh), "group")
    rows = (
        jnp.asarray(table)
        .at[tokens]
        .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    )
    if groups is not None:
        rows = groups.place(rows, "group", None, "member")
    rows = rows.astype(dtype)
    if groups is None:
        return rows
    return rows_to_time(groups.place(rows, "batch"), mesh, batch)


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


def init_score_head(key: jax.Array, hidden_size: int) -> dict[str, jax.Array]:
    """A new head, {"kernel": float32 [D, 1]}, normal with variance 1 / (D + 1).

    Source: Stiennon et al. 2020 (arXiv:2009.01325), as Huang et al. 2024
    (arXiv:2403.17031) describe it.
    """
    kernel = jax.random.normal(key, (hidden_size, 1), jnp.float32)
    return {"kernel": kernel / math.sqrt(hidden_size + 1)}
