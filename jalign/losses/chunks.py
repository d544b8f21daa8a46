"""Which tokens go into which chunk: counted ones to the front, then cut, then back.

Rows stay where they are when positions move: on a mesh that cuts the batch nothing goes
from one device to another.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, PyTree
from jalign.losses.linear import with_transpose

FOLD = 8
"""Rows that a lone row's positions are dealt to: XLA on a CPU takes up to thirty times
as long to reduce [1, S, V] as [8, S / 8, V]."""


class Grid(NamedTuple):
    """How B rows of T positions are cut into chunks of R rows and S positions.

    Attributes:
      batch, time: B and T.
      pieces_b, pieces_t: pieces of either axis; there are as many chunks as products.
      size: S; the last piece is filled up with zeros.
    """

    batch: int
    time: int
    pieces_b: int
    pieces_t: int
    size: int

    @property
    def rows(self) -> int:
        """R."""
        return -(-self.batch // self.pieces_b)


def chunk_grid(x: Array, chunk_size: int) -> Grid:
    """The fewest chunks of at most chunk_size tokens each, for x [B, T, ...]."""
    batch, time = x.shape[:2]
    pieces_b = max(1, -(-batch // chunk_size))
    most = max(1, chunk_size // max(1, batch))
    multiple = FOLD if batch == 1 and most >= FOLD else 1
    most -= most % multiple
    pieces_t = max(1, -(-time // most))
    size = -(-time // pieces_t)
    size += -size % multiple
    return Grid(batch, time, pieces_b, pieces_t, size)


def split_chunks(tree: PyTree, grid: Grid) -> PyTree:
    """[B, T, ...] -> [chunks, R, S, ...], padded with zeros to a multiple.

    The positions of a lone row become FOLD rows of each chunk.
    """
    pieces = grid.pieces_b * grid.pieces_t
    missing_b = grid.rows * grid.pieces_b - grid.batch
    missing_t = grid.size * grid.pieces_t - grid.time

    def split(x):
        x = jnp.pad(x, [(0, missing_b), (0, missing_t), *[(0, 0)] * (x.ndim - 2)])
        # Rows are dealt out with a stride, so that each chunk has some of each shard.
        x = x.reshape(grid.rows, grid.pieces_b, grid.pieces_t, grid.size, *x.shape[2:])
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(pieces, grid.rows, grid.size, *x.shape[4:])
        fold = grid.rows == 1 and grid.size % FOLD == 0
        return x.reshape(pieces, FOLD, -1, *x.shape[3:]) if fold else x

    return jax.tree.map(split, tree)


def join_chunks(tree: PyTree, grid: Grid) -> PyTree:
    """The inverse of split_chunks: [chunks, R, S, ...] -> [B, T, ...]."""

    def join(x):
        x = x.reshape(grid.pieces_b, grid.pieces_t, grid.rows, grid.size, *x.shape[3:])
        x = jnp.moveaxis(x, 2, 0)
        x = x.reshape(
            grid.rows * grid.pieces_b, grid.pieces_t * grid.size, *x.shape[4:]
        )
        return x[: grid.batch, : grid.time]

    return jax.tree.map(join, tree)


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
