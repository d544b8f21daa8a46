"""A decoder's layer as Linen modules: attention, and the block around it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jalign.models import cache as kv
from jalign.models.attention import attend
from jalign.models.how import How, Layer, Memory, Where
from jalign.models.mlp import MLP, MixtureMLP
from jalign.models.positions import rotate


class Attention(nn.Module):
    """Grouped-query attention of a kind of layer."""

    how: How

    @nn.compact
    def __call__(self, x, layer: Layer, where: Where, memory: Memory | None):
        c, how = self.how.config, self.how
        q, k, v = self._rotated(layer.kind, where, *self._heads(x))
        segments = where.segment_ids
        if memory is not None:
            all_k, k = kv.write_keys(memory[0], layer.number, where.slot, k)
            all_v, v = kv.write_values(memory[1], layer.number, where.slot, v)
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
        y = _of_kind(layer.kind, windows, attend_within)
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


class Block(nn.Module):
    """One layer; the carry is (hidden, memory).

    Attributes:
      how: sizes and switches.
      kind: which of config.kinds it is, where layers are not scanned: else an argument.
    """

    how: How
    kind: int | None = None

    @nn.compact
    def __call__(self, carry, layer: Layer, where: Where):
        c, how = self.how.config, self.how
        x, memory = carry
        if self.kind is not None:
            layer = layer._replace(kind=self.kind)
        elif memory is None:
            how = how.of_layer(layer.number)

        def attention(y):
            nonlocal memory
            y, memory = Attention(how, name="attention")(y, layer, where, memory)
            return y

        if c.experts is None:
            mlp = MLP(how, c.intermediate_size, name="mlp")
        else:
            mixture = MixtureMLP(how, name="mlp")
            mlp = functools.partial(mixture, where=where, layer=layer)
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
