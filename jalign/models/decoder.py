"""The decoder as a Linen module: blocks scanned over stacked parameters, or not."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jalign.models import cache as kv
from jalign.models.blocks import Block
from jalign.models.how import How, Layer, Where
from jalign.models.layers import Embedding, Projection
from jalign.models.platform import Policy
from jalign.models.positions import rope_tables


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
        routing: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.KVCache | None]:
        how, c = self.how, self.how.config
        x = self._embed(tokens, positions, segment_ids)
        x = how.constrain(x, "batch", "time", "act_embed")
        positions = how.constrain(positions, "batch", "time")
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
        if routing is not None:
            routing = jnp.moveaxis(routing, 2, 0)
        run = self._unrolled if self.unroll else self._scanned
        hidden, cache = run(x, where, cache, routing)
        if c.final_norm:
            hidden = how.norm("norm")(hidden)
        if c.embed_width is not None:
            shape = (c.hidden_size, c.embed_width)
            hidden = how.projection("project_out", "btd,dw->btw", shape)(hidden)
        if self.is_initializing():
            self._init_head(hidden)
        return hidden, cache

    def _embed(self, tokens, positions, segment_ids) -> jax.Array:
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
            if segment_ids is not None:  # padding may stand beyond the table
                positions = jnp.where(segment_ids == 0, 0, positions)
            x = x + learned(positions + c.position_offset)
        return how.norm("embed_norm")(x) if c.embed_norm else x

    def _scanned(self, x, where: Where, cache: kv.KVCache | None, routing):
        L = self.how.config.num_layers
        # prevent_cse: the scan already keeps forward and backward apart.
        block = self._block(cache, self.how.platform.scanned, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "routing": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=L,
        )(self.how, name="layers")
        memory = None if cache is None else (cache.k, cache.v)
        each = Layer(jnp.arange(L), jnp.asarray(self.how.config.kind_of_layer), routing)
        (x, memory), _ = layers((x, memory), each, where)
        if cache is not None:
            cache = cache._replace(k=memory[0], v=memory[1])
        return x, cache

    def _unrolled(self, x, where: Where, cache: kv.KVCache | None, routing):
        memories = []
        block = self._block(cache, self.how.platform.unrolled)
        for i, kind in enumerate(self.how.config.kind_of_layer):
            memory = None if cache is None else (cache.k[i], cache.v[i])
            layer = block(self.how, kind, name=f"layers_{i}")
            each = Layer(0, 0, None if routing is None else routing[i])
            (x, memory), _ = layer((x, memory), each, where)
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
