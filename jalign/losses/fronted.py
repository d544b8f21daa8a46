"""Counted positions moved to the front of their rows, so that the rest can be left out.

Rows stay where they are: on a mesh that cuts the batch nothing moves between devices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, PyTree
from jalign.losses.linear import with_transpose


class Front(NamedTuple):
    """Where the positions of each row go, and come from.

    Attributes:
      order: int [B, T], the positions, counted ones first, each part in order.
      inverse: int [B, T], where each position went.
      longest: int [], the most counted positions of a row.
    """

    order: jax.Array
    inverse: jax.Array
    longest: jax.Array


def make_front(mask: Array) -> Front:
    """Of a mask bool [B, T], True where a position counts."""
    counts = jnp.cumsum(mask, axis=1)
    total = counts[:, -1:]
    position = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    others = jnp.broadcast_to(total, mask.shape) + position - counts
    inverse = jnp.where(mask, counts - 1, others)
    return Front(jnp.argsort(inverse), inverse, jnp.max(total, initial=0))


def to_front(tree: PyTree, front: Front) -> PyTree:
    """Arrays [B, T, ...] in the new order."""
    move = functools.partial(_take, order=front.order, inverse=front.inverse)
    return jax.tree.map(lambda x: move(jnp.asarray(x)), tree)


def back(tree: PyTree, front: Front, mask: Array) -> PyTree:
    """The inverse of to_front for arrays [B, T], with 0 where the mask is False."""

    def move(x):
        x = _take(x, front.inverse, front.order)
        return jnp.where(mask, x, jnp.zeros_like(x))

    return jax.tree.map(move, tree)


def _take(x, order, inverse):
    """A permutation, whose gradient is a gather too; by itself it is a scatter."""
    return with_transpose(_forth, _back, (order, inverse), x)


def _forth(saved, x):
    order, _ = saved
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _back(saved, y):
    return _forth(saved[::-1], y)
