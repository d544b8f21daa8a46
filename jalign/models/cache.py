"""The key/value cache: slot p of a row holds the token at position p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jalign.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys (rotated) and values of all layers.

    Attributes:
      k, v: [L, B, S, K, H] in the model's dtype. Which slots count is not stored: a
        query at position p sees the slots up to p, all of them written by then.
    """

    k: jax.Array
    v: jax.Array


def init_cache(
    config: ModelConfig, batch: int, length: int, dtype: DTypeLike
) -> KVCache:
    """Zeros for `batch` rows of `length` slots."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def update(
    cache: KVCache, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Writes new keys and values at their positions in one layer.

    Args:
      cache: the whole cache, updated in place where XLA can.
      layer: int32 [].
      positions: int32 [B, T]; outside [0, S) nothing is written.
      k, v: [B, T, K, H].

    Returns: the new cache, and this layer's keys and values [B, S, K, H].
    """

    def write(rows, pos, new):  # one batch row: [L, S, K, H], [T], [T, K, H]
        new = new.astype(rows.dtype)
        return rows.at[layer, pos].set(new, mode="drop", wrap_negative_indices=False)

    write_all = jax.vmap(write, in_axes=(1, 0, 0), out_axes=1)
    cache = KVCache(write_all(cache.k, positions, k), write_all(cache.v, positions, v))
    return cache, cache.k[layer], cache.v[layer]
