"""A digest of arrays that does not depend on how they are sharded.

Orbax notices no flipped bit in the data it reads; this does. It guards against rot
and mixed-up files, not against an attacker.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding

PyTree = Any
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def leaf_digest(x: jax.Array) -> jax.Array:
    """uint32 [2]: the sum of all words, and their sum weighted by a hash of the place.

    Additions of uint32 wrap exactly, so every mesh gives the same digest.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    words = words.astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * jnp.uint32(16777619) + index
    # The finalizer of a 32-bit hash; odd, so that no word is multiplied away.
    place = (place ^ place >> 16) * jnp.uint32(0x7FEB352D)
    place = (place ^ place >> 15) * jnp.uint32(0x846CA68B)
    place = (place ^ place >> 16) | jnp.uint32(1)
    sums = words.sum(dtype=jnp.uint32), (words * place).sum(dtype=jnp.uint32)
    return jnp.stack(sums)


_digests = jax.jit(lambda leaves: [leaf_digest(x) for x in leaves])


def tree_digest(tree: PyTree) -> dict[str, str]:
    """Path of each leaf -> 16 hex digits. Collective: every process calls it.

    Args:
      tree: jax.Arrays without typed PRNG keys (take their key data).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = sharding.gather(_digests([leaf for _, leaf in leaves]))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _hex(pair)
        for (path, _), pair in zip(leaves, sums, strict=True)
    }


def _hex(pair: np.ndarray) -> str:
    return "".join(f"{int(word):08x}" for word in pair)


def tree_specs(tree: PyTree) -> dict[str, str]:
    """Path of each leaf -> "float32[2,3]", for arrays or ShapeDtypeStructs."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def without_keys(tree: PyTree, shapes: bool = False) -> PyTree:
    """Typed PRNG keys -> their uint32 data."""

    def strip(x):
        if not _is_key(x):
            return x
        if not shapes:
            return jax.random.key_data(x)
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)

    return jax.tree.map(strip, tree)


def with_keys(tree: PyTree, abstract: PyTree) -> PyTree:
    """The inverse: key data -> keys where `abstract` has keys."""

    def wrap(x, like):
        return jax.random.wrap_key_data(x, impl=_impl(like)) if _is_key(like) else x

    return jax.tree.map(wrap, tree, abstract)


def _impl(like) -> str:
    return str(jax.random.key_impl(jnp.empty((), like.dtype)))
