"""The decoder as Linen modules: blocks scanned over stacked parameters, or unrolled."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import cache as kv, experts
from jalign.models.attention import attend
from jalign.models.config import ModelConfig
from jalign.models.layers import (
    Embedding,
    LayerNorm,
    Projection,
    RMSNorm,
    Rotation,
    alibi_slopes,
    rope_tables,
    rotate,
)
from jalign.models.platform import PLAIN, Platform, Policy
from jalign.models.scores import Scores


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

    def norm(self, name: str) -> RMSNorm | LayerNorm:
        c = self.config
        if c.norm == "layer":
            return LayerNorm(c.norm_eps, self.dtype, c.norm_bias, name=name)
        return RMSNorm(c.norm_eps, self.dtype, c.norm_offset, name=name)

    @property
    def scores(self) -> Scores:
        c = self.config
        alibi = tuple(alibi_slopes(c).tolist()) if c.positions == "alibi" else ()
        return Scores(c.query_scale, c.attention_softcap, alibi, c.alibi_rounded)

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
      rotations: of layers.rope_tables.
      kv_positions: int32 [B, S], of the keys: the cache's slots, or the tokens.
      slot: int32 [], the first cache slot to write to.
    """

    positions: jax.Array
    segment_ids: jax.Array | None
    rotations: dict[str, Rotation]
    kv_positions: jax.Array
    slot: jax.Array


Memory = tuple[jax.Array, jax.Array]  # keys and values of all layers, see kv.KVCache


class Attention(nn.Module):
    """Grouped-query attention; `kind`, int or int32 [], is which of config.kinds."""

    how: How

    @nn.compact
    def __call__(self, x, layer, kind, where: Where, memory: Memory | None):
        c, how = self.how.config, self.how
        q, k, v = self._rotated(kind, where, *self._heads(x))
        segments = where.segment_ids
        if memory is not None:
            all_k, k = kv.write_keys(memory[0], layer, where.slot, k)
            all_v, v = kv.write_values(memory[1], layer, where.slot, v)
            memory = all_k, all_v
            segments = None  # a cache row is one document

        def attend_within(window: int | None):
            return attend(
                q,
                k,
                v,
                q_positions=where.positions,
                kv_positions=where.kv_positions,
                q_segment_ids=segments,
                kv_segment_ids=segments,
                sliding_window=window,
                scores=how.scores,
                implementation=how.attention,
                in_order=memory is None,
                mesh=how.mesh,
                platform=how.platform,
            )

        # A window that is no shorter than the keys hides none of them.
        windows = [
            None if w is None or w >= k.shape[1] else w
            for w in (each.window for each in c.kinds)
        ]
        y = _of_kind(kind, windows, attend_within)
        shape = (c.num_heads, c.head_dim, c.hidden_size)
        bias = shape[2:] if c.o_bias else None
        return how.projection("o", "btnh,nhd->btd", shape, bias)(y), memory

    def _rotated(self, kind, where: Where, q, k, v):
        c = self.how.config
        if c.positions != "rope":
            return q, k, v

        def rotated(name: str):
            if name == "none":
                return q, k
            cos, sin = where.rotations[name]
            return tuple(rotate(x, cos, sin, pairs=c.rotary_pairs) for x in (q, k))

        return *_of_kind(kind, [each.rope for each in c.kinds], rotated), v

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], before the rotation."""
        c, how = self.how.config, self.how
        q, k, v = getattr(self, "_" + c.qkv_layout)(x)
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -c.clip_qkv, c.clip_qkv) for y in (q, k, v))
        q = how.constrain(q, "batch", "time", "act_heads", None)
        k, v = (how.constrain(y, "batch", "time", "act_kv_heads", None) for y in (k, v))
        if c.qk_norm == "whole":
            over_all = [
                how.norm(f"{name}_all_norm")(y.reshape(*y.shape[:2], -1))
                for name, y in (("q", q), ("k", k))
            ]
            q, k = (y.reshape(z.shape) for y, z in zip(over_all, (q, k), strict=True))
        elif c.qk_norm:
            q, k = how.norm("q_norm")(q), how.norm("k_norm")(k)
        return q, k, v

    def _project(self, name: str, x: jax.Array, axes: str, *sizes: int) -> jax.Array:
        c = self.how.config
        shape, bias = (c.hidden_size, *sizes), sizes if c.qkv_bias else None
        equation = f"btd,d{axes}->bt{axes}"
        return self.how.projection(name, equation, shape, bias)(x)

    def _apart(self, x: jax.Array):
        c = self.how.config
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        return [self._project(y, x, "nh", n, c.head_dim) for y, n in heads.items()]

    def _joined(self, x: jax.Array):
        c = self.how.config
        N, K = c.num_heads, c.num_kv_heads
        y = self._project("qkv", x, "nh", N + 2 * K, c.head_dim)
        return jnp.split(y, [N, N + K], axis=2)

    def _groups(self, x: jax.Array):
        c = self.how.config
        K, G = c.num_kv_heads, c.num_heads // c.num_kv_heads
        y = self._project("qkv_groups", x, "kgh", K, G + 2, c.head_dim)
        q = y[:, :, :, :G].reshape(*y.shape[:2], c.num_heads, c.head_dim)
        return q, y[:, :, :, G], y[:, :, :, G + 1]


def _of_kind(kind, values: list, function):
    """function(value) of a kind of layer; only one is traced where all are equal.

    Args:
      kind: int, or int32 [] where layers are scanned.
      values: of each kind, static.
    """
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return function(different[0])
    which = [different.index(value) for value in values]
    if isinstance(kind, int):
        return function(different[which[kind]])
    branches = [functools.partial(function, value) for value in different]
    return jax.lax.switch(jnp.asarray(which)[kind], branches)


_ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class MLP(nn.Module):
    """down(f(gate(x)) * up(x)), as SwiGLU (arXiv:2002.05202); or down(f(up(x))).

    Attributes:
      how: sizes and switches.
      width: F.
    """

    how: How
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, how = self.how.config, self.how
        act, D, F = _ACTIVATIONS[c.activation], c.hidden_size, self.width

        def wide(name: str) -> jax.Array:
            bias = (F,) if c.mlp_bias else None
            return how.projection(name, "btd,df->btf", (D, F), bias)(x)

        if c.gate_up_joined:
            both = how.projection("gate_up", "btd,dpf->btpf", (D, 2, F))(x)
            hidden = act(both[:, :, 0]) * both[:, :, 1]
        elif c.gated:
            hidden = act(wide("gate")) * wide("up")
        else:
            hidden = act(wide("up"))
        hidden = how.constrain(hidden, "batch", "time", "act_mlp")
        bias = (D,) if c.mlp_bias else None
        return how.projection("down", "btf,fd->btd", (F, D), bias)(hidden)


class MixtureMLP(nn.Module):
    """Experts in the place of an MLP, see models.experts; and the shared one."""

    how: How

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, how = self.how.config, self.how
        e, D = c.experts, c.hidden_size
        assert e is not None
        act = _ACTIVATIONS[c.activation]
        router = experts.Weight((D, e.count), name="router")()
        kernels = experts.Kernels(e.count, D, c.intermediate_size, name="experts")()
        routed = experts.route(e, x, router)
        y = experts.on_mesh(how.mesh, act, x, *routed, kernels, how.dtype)
        if e.shared_size:
            gate = experts.Weight((D, 1), name="shared_gate")()
            share = jax.nn.sigmoid(x @ gate.astype(x.dtype))
            y = y + share * MLP(how, e.shared_size, name="shared")(x)
        return how.constrain(y, "batch", "time", "act_embed")


class Block(nn.Module):
    """One layer; the carry is (hidden, memory).

    Attributes:
      how: sizes and switches.
      kind: which of config.kinds it is, where layers are not scanned: else an argument.
    """

    how: How
    kind: int | None = None

    @nn.compact
    def __call__(self, carry, layer, kind, where: Where):
        c, how = self.how.config, self.how
        x, memory = carry
        kind = kind if self.kind is None else self.kind

        def attention(y):
            nonlocal memory
            y, memory = Attention(how, name="attention")(y, layer, kind, where, memory)
            return y

        if c.experts is None:
            mlp = MLP(how, c.intermediate_size, name="mlp")
        else:
            mlp = MixtureMLP(how, name="mlp")
        if c.parallel_norms:
            y = how.norm("attention_norm")(x)
            z = how.norm("mlp_norm")(x) if c.parallel_norms == 2 else y
            x = how.constrain(x + attention(y) + mlp(z), "batch", "time", "act_embed")
        else:
            x = self._add("attention", x, attention)
            x = self._add("mlp", x, mlp)
        return (x, memory), None

    def _add(self, name: str, x: jax.Array, function) -> jax.Array:
        """x and what a part of the layer adds to it, with its norms."""
        c, how = self.how.config, self.how
        if c.norm_place in ("pre", "both"):
            y = function(how.norm(f"{name}_norm")(x))
        else:
            y = function(x)
        if c.norm_place in ("both", "post"):
            y = how.norm(f"{name}_post_norm")(y)
        if c.residual_scale != 1:
            y = (y.astype(jnp.float32) * c.residual_scale).astype(y.dtype)
        x = x + y
        if c.norm_place == "after":
            x = how.norm(f"{name}_norm")(x)
        return how.constrain(x, "batch", "time", "act_embed")


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
        x = how.constrain(self._embed(tokens, positions), "batch", "time", "act_embed")
        rotations = rope_tables(c, positions, segment_ids)
        rotations = jax.tree.map(how.platform.keep, rotations)
        kv_positions, slot = positions, jnp.int32(0)
        if cache is not None:
            seen = positions
            if segment_ids is not None:  # padding is never seen
                seen = jnp.where(segment_ids == 0, kv.NEVER, positions)
            slot, cache = cache.next, kv.advance(cache, seen)
            kv_positions = cache.positions
        where = Where(positions, segment_ids, rotations, kv_positions, slot)
        hidden, cache = (self._unrolled if self.unroll else self._scanned)(
            x, where, cache
        )
        if c.final_norm:
            hidden = how.norm("norm")(hidden)
        if c.embed_width is not None:
            shape = (c.hidden_size, c.embed_width)
            hidden = how.projection("project_out", "btd,dw->btw", shape)(hidden)
        if self.is_initializing():
            self._init_head(hidden)
        return hidden, cache

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What the layers start from, [B, T, D]."""
        how, c = self.how, self.how.config
        table = functools.partial(Embedding, dtype=how.dtype, mesh=how.mesh)
        x = table(c.vocab_size, c.head_width, name="embed")(tokens)
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if c.embed_width is not None:
            shape = (c.embed_width, c.hidden_size)
            x = how.projection("project_in", "btw,wd->btd", shape)(x)
        if c.positions == "learned":
            rows = c.max_position + c.position_offset
            learned = table(rows, c.hidden_size, name="positions")
            x = x + learned(positions + c.position_offset)
        return how.norm("embed_norm")(x) if c.embed_norm else x

    def _scanned(self, x, where: Where, cache: kv.KVCache | None):
        L = self.how.config.num_layers
        # prevent_cse: the scan already keeps forward and backward apart.
        block = self._block(cache, self.how.platform.scanned, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=L,
        )(self.how, name="layers")
        memory = None if cache is None else (cache.k, cache.v)
        kinds = jnp.asarray(self.how.config.kind_of_layer)
        (x, memory), _ = layers((x, memory), jnp.arange(L), kinds, where)
        if cache is not None:
            cache = cache._replace(k=memory[0], v=memory[1])
        return x, cache

    def _unrolled(self, x, where: Where, cache: kv.KVCache | None):
        memories = []
        block = self._block(cache, self.how.platform.unrolled)
        for i, kind in enumerate(self.how.config.kind_of_layer):
            memory = None if cache is None else (cache.k[i], cache.v[i])
            layer = block(self.how, kind, name=f"layers_{i}")
            (x, memory), _ = layer((x, memory), 0, 0, where)
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
            bias = (outputs,) if c.head_bias and not c.num_labels else None
            shape = (c.head_width, outputs)
            Projection("btd,dv->btv", shape, bias, name=name)(hidden)


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
