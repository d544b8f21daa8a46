"""Tests for jalign/models/cache.py."""

import jax.numpy as jnp
import numpy as np

from jalign.models.cache import init_cache, update
from tests.models.tiny import CONFIGS


def test_update_writes_at_positions_of_one_layer_and_drops_the_rest():
    cache = init_cache(CONFIGS["llama"], 2, 5, jnp.float32)
    k = jnp.arange(2 * 3 * 2 * 10, dtype=jnp.float32).reshape(2, 3, 2, 10) + 1
    positions = jnp.array([[0, 1, 2], [4, 5, -1]])
    cache, layer_k, layer_v = update(cache, jnp.int32(1), positions, k, 2 * k)
    want = np.zeros((2, 2, 5, 2, 10))
    want[1, 0, :3], want[1, 1, 4] = k[0], k[1, 0]
    np.testing.assert_array_equal(cache.k, want)
    np.testing.assert_array_equal(layer_k, want[1])
    np.testing.assert_array_equal(layer_v, 2 * want[1])
