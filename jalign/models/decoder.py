"""The decoder as Linen modules: blocks scanned over stacked parameters, or unrolled."""

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
    Projection,
    RMSNorm,
    rope_tables,
    rotate,
)
from jalign.models.platform import PLAIN, Platform, Policy


class How(NamedTuple):
    """How all modules of a decoder compute.

    Attributes:
      config: the sizes.
      mesh: for sharding constraints and kernels; None on one device.
      dtype: of activations and matmul inputs.
      attention: an implementation of attention.attend.
      platform: what is best where it runs.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32
    attention: str = "plain"
    platform: Platform = PLAIN

    def constrain(self, x: jax.Array, *logical_axes: str | None) -> jax.Array:
        return sharding.constrain(x, self.mesh, *logical_axes)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.norm_eps, self.dtype, name=name)

    def projection(
        self,
        name: str,
        equation: str,
        shape: tuple[int, ...],
        bias_shape: tuple[int, ...] | None = None,
    ) -> Projection:
        how = self.dtype, self.platform, self.mesh
        return Projection(equation, shape, bias_shape, *how, name=name)


class Where(NamedTuple):
    """What all layers share about the tokens at hand; [B, T] each.

    Attributes:
      positions: int32.
      segment_ids: int32, or None when every row is one document.
      cos, sin: float32 [B, T, H/2].
      kv_positions: int32 [B, S], of the keys: the cache's slots, or the tokens.
      slot: int32 [], the first cache slot to write to.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    kv_positions: jax.Array
    slot: jax.Array


Memory = tuple[jax.Array, jax.Array]  # keys and values of all layers, see kv.KVCache


class Attention(nn.Module):
    """Grouped-query attention, with qkv biases and query/key norms where asked for."""

    how: How

    @nn.compact
    def __call__(self, x, layer, where: Where, memory: Memory | None):
        c, how = self.how.config, self.how
        q = self._heads("q", x, c.num_heads, "act_heads")
        k = self._heads("k", x, c.num_kv_heads, "act_kv_heads")
        v = self._heads("v", x, c.num_kv_heads, "act_kv_heads")
        if c.qk_norm:
            q, k = how.norm("q_norm")(q), how.norm("k_norm")(k)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        segments = where.segment_ids
        if memory is not None:
            all_k, k = kv.write_keys(memory[0], layer, where.slot, k)
            all_v, v = kv.write_values(memory[1], layer, where.slot, v)
            memory = all_k, all_v
            segments = None  # a cache row is one document
        y = attend(
            q,
            k,
            v,
            q_positions=where.positions,
            kv_positions=where.kv_positions,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            sliding_window=c.sliding_window,
            implementation=how.attention,
            in_order=memory is None,
            mesh=how.mesh,
            platform=how.platform,
        )
        shape = (c.num_heads, c.head_dim, c.hidden_size)
        return how.projection("o", "btnh,nhd->btd", shape)(y), memory

    def _heads(self, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        c, how = self.how.config, self.how
        shape = (c.hidden_size, heads, c.head_dim)
        bias = shape[1:] if c.qkv_bias else None
        y = how.projection(name, "btd,dnh->btnh", shape, bias)(x)
        return how.constrain(y, "batch", "time", axis, None)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (arXiv:2002.05202)."""

    how: How

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        how = self.how
        D, F = how.config.hidden_size, how.config.intermediate_size
        gate = how.projection("gate", "btd,df->btf", (D, F))(x)
        up = how.projection("up", "btd,df->btf", (D, F))(x)
        hidden = how.constrain(nn.silu(gate) * up, "batch", "time", "act_mlp")
        return how.projection("down", "btf,fd->btd", (F, D))(hidden)


class Block(nn.Module):
    """One pre-norm layer; the carry is (hidden, memory)."""

    how: How

    @nn.compact
    def __call__(self, carry, layer, where: Where):
        how = self.how
        x, memory = carry
        y = how.norm("attention_norm")(x)
        y, memory = Attention(how, name="attention")(y, layer, where, memory)
        x = how.constrain(x + y, "batch", "time", "act_embed")
        y = GatedMLP(how, name="mlp")(how.norm("mlp_norm")(x))
        x = how.constrain(x + y, "batch", "time", "act_embed")
        return (x, memory), None


class Decoder(nn.Module):
    """Tokens -> hidden states after the final norm.

    Attributes:
      how: sizes, dtype, mesh and platform.
      remat: whether the backward pass recomputes each block instead of storing it. If
        not, it recomputes what the platform says.
      unroll: each layer has its own parameters, "layers_0", ..., and its own code.
    """

    how: How
    remat: bool = False
    unroll: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: kv.KVCache | None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        how, c = self.how, self.how.config
        sizes = c.vocab_size, c.hidden_size
        embed = Embedding(*sizes, how.dtype, how.mesh, name="embed")
        x = how.constrain(embed(tokens), "batch", "time", "act_embed")
        cos, sin = map(how.platform.keep, rope_tables(c, positions))
        kv_positions, slot = positions, jnp.int32(0)
        if cache is not None:
            seen = positions
            if segment_ids is not None:  # padding is never seen
                seen = jnp.where(segment_ids == 0, kv.NEVER, positions)
            slot, cache = cache.next, kv.advance(cache, seen)
            kv_positions = cache.positions
        where = Where(positions, segment_ids, cos, sin, kv_positions, slot)
        x, cache = (self._unrolled if self.unroll else self._scanned)(x, where, cache)
        hidden = how.norm("norm")(x)
        if self.is_initializing():
            self._init_head(hidden)
        return hidden, cache

    def _scanned(self, x, where: Where, cache: kv.KVCache | None):
        L = self.how.config.num_layers
        # prevent_cse: the scan already keeps forward and backward apart.
        block = self._block(cache, self.how.platform.scanned, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=L,
        )(self.how, name="layers")
        memory = None if cache is None else (cache.k, cache.v)
        (x, memory), _ = layers((x, memory), jnp.arange(L), where)
        if cache is not None:
            cache = cache._replace(k=memory[0], v=memory[1])
        return x, cache

    def _unrolled(self, x, where: Where, cache: kv.KVCache | None):
        memories = []
        block = self._block(cache, self.how.platform.unrolled)
        for i in range(self.how.config.num_layers):
            memory = None if cache is None else (cache.k[i], cache.v[i])
            layer = block(self.how, name=f"layers_{i}")
            (x, memory), _ = layer((x, memory), 0, where)
            memories.append(memory)
        if cache is not None:
            k, v = zip(*memories, strict=True)
            cache = cache._replace(k=k, v=v)
        return x, cache

    def _block(self, cache: kv.KVCache | None, policy: Policy | None, **how) -> Any:
        """Block, as its backward pass wants it."""
        if self.remat:
            return nn.remat(Block, **how)
        if cache is None and policy is not None:
            return nn.remat(Block, policy=policy, **how)
        return Block

    def _init_head(self, hidden: jax.Array) -> None:
        """Creates the head's parameters; Model applies it, outside of the module."""
        c = self.how.config
        name = "score" if c.num_labels else "unembed"
        outputs = c.num_labels or c.vocab_size
        if c.num_labels or not c.tie_embeddings:
            Projection("btd,dv->btv", (c.hidden_size, outputs), name=name)(hidden)


def unstack_layers(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """{"layers": stacked, ...} -> {"layers_0": ..., "layers_1": ..., ...}."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    leaves, structure = jax.tree.flatten(params["layers"])
    # A split's gradient is one concatenation; that of slices would be a sum of pads.
    ones = (1,) * num_layers
    pieces = [[y[0] for y in jax.lax.split(x, ones)] for x in leaves]
    for i in range(num_layers):
        rest[f"layers_{i}"] = structure.unflatten([piece[i] for piece in pieces])
    return rest
