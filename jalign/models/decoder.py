"""The decoder as Linen modules: blocks scanned over stacked parameters, or unrolled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import cache as kv
from jalign.models.attention import attend, platform_of
from jalign.models.attention_blocked import KEPT
from jalign.models.config import ModelConfig
from jalign.models.layers import (
    Embedding,
    GatedMLP,
    Projection,
    RMSNorm,
    project,
    rope_tables,
    rotate,
    written_out,
)

_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(KEPT),
)


def products(primitive, *args, **params) -> bool:
    """What is stored for the backward pass: products of matrices and attention.

    Norms, rotations and gates take no longer to compute again than to write to memory
    and read back.
    """
    # cuDNN's kernel, by the name of jax's primitive; its output cannot be named.
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or bool(_PRODUCTS(primitive, *args, **params))


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

    config: ModelConfig
    mesh: Mesh | None
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, x, layer, where: Where, memory: Memory | None):
        c = self.config
        q = self._project("q", x, c.num_heads, "act_heads")
        k = self._project("k", x, c.num_kv_heads, "act_kv_heads")
        v = self._project("v", x, c.num_kv_heads, "act_kv_heads")
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, self.dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, self.dtype, name="k_norm")(k)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        q_segments = kv_segments = where.segment_ids
        if memory is not None:
            all_k, k = kv.write_keys(memory[0], layer, where.slot, k)
            all_v, v = kv.write_values(memory[1], layer, where.slot, v)
            memory = all_k, all_v
            q_segments = kv_segments = None  # a cache row is one document
        y = attend(
            q,
            k,
            v,
            q_positions=where.positions,
            kv_positions=where.kv_positions,
            q_segment_ids=q_segments,
            kv_segment_ids=kv_segments,
            sliding_window=c.sliding_window,
            implementation=self.attention,
            in_order=memory is None,
            mesh=self.mesh,
        )
        shape = (c.num_heads, c.head_dim, c.hidden_size)
        how = {"dtype": self.dtype, "product": _product(self.attention, self.mesh)}
        return Projection("btnh,nhd->btd", shape, **how, name="o")(y), memory

    def _project(self, name: str, x: jax.Array, heads: int, axis: str) -> jax.Array:
        c = self.config
        y = Projection(
            "btd,dnh->btnh",
            (c.hidden_size, heads, c.head_dim),
            bias_shape=(heads, c.head_dim) if c.qkv_bias else None,
            dtype=self.dtype,
            product=_product(self.attention, self.mesh),
            name=name,
        )(x)
        return sharding.constrain(y, self.mesh, "batch", "time", axis, None)


class Block(nn.Module):
    """One pre-norm layer; the carry is (hidden, memory)."""

    config: ModelConfig
    mesh: Mesh | None
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, carry, layer, where: Where):
        c, mesh, dtype = self.config, self.mesh, self.dtype
        constrain = functools.partial(_constrain, mesh=mesh)
        x, memory = carry
        y = RMSNorm(c.norm_eps, dtype, name="attention_norm")(x)
        attention = Attention(c, mesh, dtype, self.attention, name="attention")
        y, memory = attention(y, layer, where, memory)
        x = constrain(x + y, "batch", "time", "act_embed")
        y = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x)
        product = _product(self.attention, mesh)
        y = GatedMLP(c, dtype, product, name="mlp")(y, constrain)
        x = constrain(x + y, "batch", "time", "act_embed")
        return (x, memory), None


def _product(attention: str, mesh: Mesh | None) -> Callable[..., Any]:
    """How projections multiply: plain is plain throughout, for forward mode too."""
    fast = attention != "plain" and platform_of(mesh) == "cpu"
    return project if fast else jnp.einsum


def _constrain(x, *logical_axes, mesh):
    return sharding.constrain(x, mesh, *logical_axes)


class Decoder(nn.Module):
    """Tokens -> hidden states after the final norm.

    Attributes:
      config: the sizes.
      mesh: for sharding constraints and kernels; None on one device.
      dtype: of activations and matmul inputs.
      remat: whether the backward pass recomputes each block instead of storing it. If
        not, it recomputes on a CPU or GPU what is no product of matrices.
      attention: an implementation of attention.attend.
      unroll: each layer has its own parameters, "layers_0", ..., and its own code.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: str = "auto"
    unroll: bool = False

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
        cos, sin = rope_tables(c, positions)
        if platform_of(self.mesh) == "cpu":
            cos, sin = written_out(cos), written_out(sin)
        kv_positions, slot = positions, jnp.int32(0)
        if cache is not None:
            seen = positions
            if segment_ids is not None:  # padding is never seen
                seen = jnp.where(segment_ids == 0, kv.NEVER, positions)
            slot, cache = cache.next, kv.advance(cache, seen)
            kv_positions = cache.positions
        where = Where(positions, segment_ids, cos, sin, kv_positions, slot)
        x, cache = (self._unrolled if self.unroll else self._scanned)(x, where, cache)
        hidden = RMSNorm(c.norm_eps, self.dtype, name="norm")(x)
        if self.is_initializing():
            self._init_head(hidden)
        return hidden, cache

    def _scanned(self, x, where: Where, cache: kv.KVCache | None):
        c = self.config
        # prevent_cse: the scan already keeps forward and backward apart.
        block = self._block(cache, ("cpu", "gpu"), prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
        )(c, self.mesh, self.dtype, self.attention, name="layers")
        memory = None if cache is None else (cache.k, cache.v)
        (x, memory), _ = layers((x, memory), jnp.arange(c.num_layers), where)
        if cache is not None:
            cache = cache._replace(k=memory[0], v=memory[1])
        return x, cache

    def _unrolled(self, x, where: Where, cache: kv.KVCache | None):
        c, memories = self.config, []
        # A CPU's compiler would drop the barriers that keep this from being undone.
        block = self._block(cache, ("gpu",))
        for i in range(c.num_layers):
            memory = None if cache is None else (cache.k[i], cache.v[i])
            layer = block(c, self.mesh, self.dtype, self.attention, name=f"layers_{i}")
            (x, memory), _ = layer((x, memory), 0, where)
            memories.append(memory)
        if cache is not None:
            k, v = zip(*memories, strict=True)
            cache = cache._replace(k=k, v=v)
        return x, cache

    def _block(self, cache: kv.KVCache | None, platforms: tuple, **how: Any) -> Any:
        """Block, as its backward pass wants it; products are stored on `platforms`."""
        if self.remat:
            return nn.remat(Block, **how)
        if cache is None and platform_of(self.mesh) in platforms:
            return nn.remat(Block, policy=products, **how)
        return Block

    def _init_head(self, hidden: jax.Array) -> None:
        """Creates the head's parameters; Model applies it, outside of the module."""
        c = self.config
        name = "score" if c.num_labels else "unembed"
        outputs = c.num_labels or c.vocab_size
        if c.num_labels or not c.tie_embeddings:
            Projection("btd,dv->btv", (c.hidden_size, outputs), name=name)(hidden)
