"""Tests for jalign/models/cache.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.models import cache as kv
from tests.models.tiny import CONFIGS

CONFIG = CONFIGS["llama"]  # two layers, two kv heads of 10 features


def random_cache(unrolled, rows, slots, seed=0):
    """A cache in which every slot is taken by another position."""
    cache = kv.init_cache(CONFIG, rows, slots, jnp.float32, unrolled=unrolled)
    rng = np.random.default_rng(seed)
    k, v = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), cache[:2])
    positions = jnp.int32(rng.permutation(rows * slots).reshape(rows, slots))
    return kv.KVCache(k, v, positions, jnp.int32(slots))


def layers(x):
    return np.concatenate(x) if isinstance(x, tuple) else np.asarray(x)


both = pytest.mark.parametrize("unrolled", [False, True])


@both
def test_a_new_cache_is_seen_by_no_query(unrolled):
    cache = kv.init_cache(CONFIG, 3, 5, jnp.bfloat16, unrolled=unrolled)
    assert layers(cache.k).shape == (2, 3, 2, 10, 5)
    assert layers(cache.v).shape == (2, 3, 2, 5, 10)
    assert (np.asarray(cache.positions) == np.iinfo(np.int32).max).all()


def test_advance_notes_positions_slot_by_slot():
    cache = kv.init_cache(CONFIG, 2, 4, jnp.float32)
    cache = kv.advance(cache, jnp.array([[0, 1, 2], [0, 1, kv.NEVER]]))
    cache = kv.advance(cache, jnp.array([[3], [2]]))
    want = [[0, 1, 2, 3], [0, 1, kv.NEVER, 2]]
    np.testing.assert_array_equal(cache.positions, want)
    assert cache.next == 4


def test_write_fills_the_slots_of_one_layer():
    cache = kv.init_cache(CONFIG, 2, 5, jnp.float32)
    new = jnp.arange(2 * 3 * 2 * 10, dtype=jnp.float32).reshape(2, 3, 2, 10) + 1
    want = np.zeros((2, 2, 5, 2, 10))  # [L, B, S, K, H]
    want[1, :, 2:] = new
    for write, memory, axes in (
        (kv.write_keys, cache.k, (0, 1, 3, 4, 2)),
        (kv.write_values, cache.v, (0, 1, 3, 2, 4)),
    ):
        memory, layer = write(memory, jnp.int32(1), jnp.int32(2), new)
        np.testing.assert_array_equal(memory, want.transpose(axes))
        np.testing.assert_array_equal(layer, want[1])


@both
def test_rows_are_taken_with_all_that_is_theirs(unrolled):
    cache = random_cache(unrolled, 4, 3)
    taken = kv.take_rows(cache, jnp.array([2, 2, 0]))
    for got, want in ((taken.k, cache.k), (taken.v, cache.v)):
        np.testing.assert_array_equal(layers(got), layers(want)[:, [2, 2, 0]])
    np.testing.assert_array_equal(taken.positions, cache.positions[np.array([2, 2, 0])])
    repeated, same = kv.repeat_rows(cache, 2), kv.take_rows(cache, jnp.arange(8) // 2)
    jax.tree.map(np.testing.assert_array_equal, repeated, same)


@both
def test_lengthen_adds_slots_that_are_not_seen(unrolled):
    cache = random_cache(unrolled, 2, 3)
    longer = kv.lengthen(cache, 2)
    assert layers(longer.k).shape == (2, 2, 2, 10, 5)
    assert layers(longer.v).shape == (2, 2, 2, 5, 10)
    assert kv.slots(longer) == 5
    np.testing.assert_array_equal(longer.positions[:, :3], cache.positions)
    assert (np.asarray(longer.positions[:, 3:]) == kv.NEVER).all()
    assert longer.next == cache.next
