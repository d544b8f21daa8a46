"""The decoder as Linen modules: blocks scanned over stacked parameters."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import cache as kv
from jalign.models.attention import attend
from jalign.models.config import ModelConfig
from jalign.models.layers import (
    Embedding,
    GatedMLP,
    Projection,
    RMSNorm,
    rope_tables,
    rotate,
)


class Where(NamedTuple):
    """What all layers share about the tokens at hand; [B, T] each.

    Attributes:
      positions: int32.
      segment_ids: int32, or None when every row is one document.
      slots: int32, cache slots to write to (out of range: none).
      cos, sin: float32 [B, T, H/2].
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    slots: jax.Array
    cos: jax.Array
    sin: jax.Array


class Attention(nn.Module):
    """Grouped-query attention, with qkv biases and query/key norms where asked for."""

    config: ModelConfig
    mesh: Mesh | None
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, x, layer, where: Where, cache: kv.KVCache | None):
        c = self.config
        q = self._project("q", x, c.num_heads, "act_heads")
        k = self._project("k", x, c.num_kv_heads, "act_kv_heads")
        v = self._project("v", x, c.num_kv_heads, "act_kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, self.dtype, name="k_norm")(k)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        q_segments = kv_segments = where.segment_ids
        kv_positions = where.positions
        if cache is not None:
            cache, k, v = kv.update(cache, layer, where.slots, k, v)
            slots = jnp.arange(k.shape[1], dtype=jnp.int32)
            kv_positions = jnp.broadcast_to(slots, k.shape[:2])
            q_segments = kv_segments = None  # a cache row is one document
        y = attend(
            q,
            k,
            v,
            q_positions=where.positions,
            kv_positions=kv_positions,
            q_segment_ids=q_segments,
            kv_segment_ids=kv_segments,
            sliding_window=c.sliding_window,
            implementation=self.attention,
            in_order=cache is None,
            mesh=self.mesh,
        )
        shape = (c.num_heads, c.head_dim, c.hidden_size)
        y = Projection("btnh,nhd->btd", shape, dtype=self.dtype, name="o")(y)
        return y, cache

    def _project(self, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        c = self.config
        y = Projection(
            "btd,dnh->btnh",
            (c.hidden_size, heads, c.head_dim),
            bias_shape=(heads, c.head_dim) if c.qkv_bias else None,
            dtype=self.dtype,
            name=name,
        )(x)
        return sharding.constrain(y, self.mesh, "batch", "time", axis, None)


class Block(nn.Module):
    """One pre-norm layer; the carry is (hidden, cache)."""

    config: ModelConfig
    mesh: Mesh | None
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, carry, layer, where: Where):
        c, mesh, dtype = self.config, self.mesh, self.dtype
        constrain = functools.partial(_constrain, mesh=mesh)
        x, cache = carry
        y = RMSNorm(c.norm_eps, dtype, name="attention_norm")(x)
        attention = Attention(c, mesh, dtype, self.attention, name="attention")
        y, cache = attention(y, layer, where, cache)
        x = constrain(x + y, "batch", "time", "act_embed")
        y = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        y = GatedMLP(c, dtype, name="mlp")(y, constrain)
        x = constrain(x + y, "batch", "time", "act_embed")
        return (x, cache), None


def _constrain(x, *logical_axes, mesh):
    return sharding.constrain(x, mesh, *logical_axes)


class Decoder(nn.Module):
    """Tokens -> hidden states after the final norm.

    Attributes:
      config: the sizes.
      mesh: for sharding constraints and kernels; None on one device.
      dtype: of activations and matmul inputs.
      remat: whether the backward pass recomputes each block instead of storing it.
      attention: an implementation of attention.attend.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        c = self.config
        embed = Embedding(
            c.vocab_size, c.hidden_size, self.dtype, mesh=self.mesh, name="embed"
        )
        x = _constrain(embed(tokens), "batch", "time", "act_embed", mesh=self.mesh)
        # With a cache, tokens of segment 0 are padding and leave no trace in it.
        slots = positions
        if cache is not None and segment_ids is not None:
            slots = jnp.where(segment_ids == 0, cache.k.shape[2], positions)
        cos, sin = rope_tables(c, positions)
        where = Where(positions, segment_ids, slots, cos, sin)
        # prevent_cse: the scan already keeps forward and backward apart.
        block: Any = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )(c, self.mesh, self.dtype, self.attention, name="layers")
        (x, cache), _ = layers((x, cache), jnp.arange(c.num_layers), where)
        hidden = RMSNorm(c.norm_eps, self.dtype, name="norm")(x)
        if self.is_initializing():
            self._init_head(hidden)
        return hidden, cache

    def _init_head(self, hidden: jax.Array) -> None:
        """Creates the head's parameters; Model applies it, outside of the module."""
        c = self.config
        name = "score" if c.num_labels else "unembed"
        outputs = c.num_labels or c.vocab_size
        if c.num_labels or not c.tie_embeddings:
            Projection("btd,dv->btv", (c.hidden_size, outputs), name=name)(hidden)
