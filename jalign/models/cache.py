"""The key/value cache: slots that are written in order, each with its position.

All rows write to the same slots, so that one update in place serves the whole batch;
which of them a row may look at is told by the positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models.config import ModelConfig

NEVER = np.iinfo(np.int32).max
"""The position of a slot that no query sees: it is later than any."""

AXES = ("layers", "batch", "act_kv_heads", None, None)
"""Logical, of keys and of values."""

Layers = jax.Array | tuple[jax.Array, ...]


class KVCache(NamedTuple):
    """Keys (rotated) and values of all layers.

    Attributes:
      k: [L, B, K, H, S] in the model's dtype, or one [1, B, K, H, S] a layer where the
        layers are unrolled. Slots last: the scores of a query are sums over H.
      v: [L, B, K, S, H], or one a layer: outputs are sums over S.
      positions: int32 [B, S], of the token in each slot. A query at position p sees
        the slots with positions <= p.
      next: int32 [], the slot that the next token goes to.
    """

    k: Layers
    v: Layers
    positions: jax.Array
    next: jax.Array


def init_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: DTypeLike,
    *,
    unrolled: bool = False,
) -> KVCache:
    """Zeros for `batch` rows of `length` slots, none of them to be seen."""
    rows, layers = (batch, config.num_kv_heads), config.num_layers

    def zeros(*of_head: int) -> Layers:
        if unrolled:
            shape = (1, *rows, *of_head)
            return tuple(jnp.zeros(shape, dtype) for _ in range(layers))
        return jnp.zeros((layers, *rows, *of_head), dtype)

    positions = jnp.full((batch, length), NEVER, jnp.int32)
    k, v = zeros(config.head_dim, length), zeros(length, config.head_dim)
    return KVCache(k, v, positions, jnp.int32(0))


def place_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """The cache cut by rows and heads, in a jitted function."""
    k, v = jax.tree.map(
        lambda x: sharding.constrain(x, mesh, *AXES), (cache.k, cache.v)
    )
    seen = sharding.constrain(cache.positions, mesh, "batch", None)
    return cache._replace(k=k, v=v, positions=seen)


def slots(cache: KVCache) -> int:
    """S, of the cache."""
    return cache.positions.shape[1]


def advance(cache: KVCache, positions: jax.Array) -> KVCache:
    """Notes the positions, int32 [B, T], of the T tokens that go into the next slots.

    Args:
      cache: the keys and values follow layer by layer, by `write`.
      positions: NEVER for padding.
    """
    time = positions.shape[1]
    noted = jax.lax.dynamic_update_slice(cache.positions, positions, (0, cache.next))
    return cache._replace(positions=noted, next=cache.next + time)


def write_keys(
    layers: jax.Array, layer: jax.Array | int, slot: jax.Array, new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes keys into one layer, in place where XLA can.

    Args:
      layers: [L, B, K, H, S].
      layer: int32 [].
      slot: int32 [], of the first token.
      new: [B, T, K, H].

    Returns: the new layers, and the layer written to as [B, S, K, H].
    """
    return _write(layers, layer, slot, new, (0, 2, 3, 1))


def write_values(
    layers: jax.Array, layer: jax.Array | int, slot: jax.Array, new: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`write_keys` for values: layers [L, B, K, S, H]."""
    return _write(layers, layer, slot, new, (0, 2, 1, 3))


def _write(layers, layer, slot, new, axes: tuple[int, ...]):
    """`axes` of new [B, T, K, H] are in the cache's order."""
    zero = jnp.int32(0)
    place = (jnp.int32(layer), *(slot if axis == 1 else zero for axis in axes))
    new = new.transpose(axes)[None].astype(layers.dtype)
    layers = jax.lax.dynamic_update_slice(layers, new, place)
    return layers, layers[layer].transpose(np.argsort(axes))


def take_rows(cache: KVCache, rows: jax.Array) -> KVCache:
    """The rows of a cache, int32 [B'], in their order."""
    k, v = jax.tree.map(lambda x: x[:, rows], (cache.k, cache.v))
    return KVCache(k, v, cache.positions[rows], cache.next)


def repeat_rows(cache: KVCache, times: int) -> KVCache:
    """Each row `times` times, behind each other."""
    k, v = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), (cache.k, cache.v))
    return KVCache(k, v, jnp.repeat(cache.positions, times, axis=0), cache.next)


def lengthen(cache: KVCache, more: int) -> KVCache:
    """A cache with so many more slots behind."""
    no, behind = (0, 0), (0, more)
    k = jax.tree.map(lambda x: jnp.pad(x, [no, no, no, no, behind]), cache.k)
    v = jax.tree.map(lambda x: jnp.pad(x, [no, no, no, behind, no]), cache.v)
    positions = jnp.pad(cache.positions, [no, behind], constant_values=NEVER)
    return KVCache(k, v, positions, cache.next)
