"""Arrays that no host or device holds whole: read by rows, and fetched by pieces.

The rows of a file lie one after another, and a mesh may cut any axis: a process that
reads only what its devices hold reads a few bytes of each row, and so all pages. Here
each device is dealt a block of whole rows, and the devices exchange them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jalign.sharding.partition import replicated

PIECE_BYTES = 2**24
"""Of an array that is fetched: on each device at once, but for one row at least."""


class Deal(NamedTuple):
    """How a file's tensor [R, ...] is dealt: blocks of rows, one for each device.

    The rows are `parts` parts, as many as the parameter cuts that axis into, and each
    part is `blocks` blocks, the last ones shorter or empty.

    Attributes:
      shape: of the tensor in the file.
      parts, blocks: their numbers; parts x blocks devices.
      rows: of a full block.
      place: of the blocks side by side, [parts x blocks x rows, ...].
      joined: of [parts, blocks x rows, ...], with the parameter's cuts.
    """

    shape: tuple[int, ...]
    parts: int
    blocks: int
    rows: int
    place: NamedSharding
    joined: NamedSharding


def deal(target: NamedSharding, axes: Sequence[int], shape: tuple[int, ...]) -> Deal:
    """Deals a file's tensor to the devices that will hold the parameter.

    Blocks follow the mesh's order of devices, so that a process has neighbours, but for
    the axes that cut the rows of the parameter too, which come first: what is left is
    one all-to-all.

    Args:
      target: of the parameter.
      axes: for each axis of the tensor, the axis of the parameter that it begins with.
      shape: of the tensor.
    """
    mesh, spec = target.mesh, target.spec
    cuts = [spec[axis] if axis < len(spec) else None for axis in axes]
    first = (cuts[0],) if isinstance(cuts[0], str) else cuts[0] or ()
    rest = tuple(name for name in mesh.axis_names if name not in first)
    parts, blocks = (math.prod(mesh.shape[n] for n in names) for names in (first, rest))
    return Deal(
        shape=shape,
        parts=parts,
        blocks=blocks,
        rows=-(-shape[0] // (parts * blocks)),
        place=NamedSharding(mesh, PartitionSpec((*first, *rest))),
        joined=NamedSharding(mesh, PartitionSpec(cuts[0], None, *cuts[1:])),
    )


def read(
    dealt: Deal, read_rows: Callable[[int, int], np.ndarray], dtype: np.dtype
) -> jax.Array:
    """The blocks, of which each process reads those of its devices; see `Deal.place`.

    Args:
      dealt: of `deal`.
      read_rows: (start, stop) -> these rows of the tensor; stop > start.
      dtype: of the rows.
    """
    of_part = dealt.shape[0] // dealt.parts

    def block(index: tuple[slice, ...]) -> np.ndarray:
        number = (index[0].start or 0) // dealt.rows
        part, place = divmod(number, dealt.blocks)
        start, stop = (min((place + i) * dealt.rows, of_part) for i in range(2))
        if stop - start == dealt.rows:
            return read_rows(part * of_part + start, part * of_part + stop)
        out = np.zeros((dealt.rows, *dealt.shape[1:]), dtype)
        if stop > start:
            rows = read_rows(part * of_part + start, part * of_part + stop)
            out[: stop - start] = rows
        return out

    num_rows = dealt.parts * dealt.blocks * dealt.rows
    shape = (num_rows, *dealt.shape[1:])
    return jax.make_array_from_callback(shape, dealt.place, block)


def join(dealt: Deal, blocks: jax.Array) -> jax.Array:
    """The tensor, of what `read` gives; cut as the parameter is. Inside of a jit."""
    x = blocks.reshape(dealt.parts, -1, *dealt.shape[1:])
    x = jax.lax.with_sharding_constraint(x, dealt.joined)
    return x[:, : dealt.shape[0] // dealt.parts].reshape(dealt.shape)


def fetch(
    x: jax.Array | np.ndarray, index: tuple[int, ...], out: np.ndarray | None
) -> None:
    """Copies x[index] into `out`. Collective where the processes share x.

    Args:
      x: an array, cut along its other axes only, of which there is one at least.
      index: of its first axes.
      out: of the shape of x[index], any strides; None where another process wants it.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        _fetch_shared(x, index, out)
    elif out is not None and isinstance(x, jax.Array):
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                out[shard.index[len(index) :]] = _on_host(shard.data, index)
    elif out is not None:
        out[...] = x[index]


def _on_host(x: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """x[index] of an array on one device; a CPU's is in the host's memory already."""
    (device,) = x.devices()
    if device.platform == "cpu":
        return np.asarray(x)[index]
    return np.asarray(_at(x, np.asarray(index, np.int32)))


@jax.jit
def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    for i in index:
        x = jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return x


def _fetch_shared(x: jax.Array, index: tuple[int, ...], out: np.ndarray | None) -> None:
    """By pieces that all devices get: of one axis, some rows of each shard's."""
    shape = x.shape[len(index) :]
    local = x.sharding.shard_shape(x.shape)[len(index) :]
    axis = int(np.argmax(local))
    ways, size = shape[axis] // local[axis], local[axis]
    row_bytes = math.prod(shape) // size * x.dtype.itemsize
    rows = min(max(PIECE_BYTES // row_bytes, 1), size)
    if out is not None:
        out = out.reshape(*shape[:axis], ways, size, *shape[axis + 1 :])
    for start in range(0, size, rows):
        start = min(start, size - rows)  # the last one is as large: compiled once
        place = np.asarray([*index, start], np.int32)
        piece = _piece(x, place, axis, ways, rows, replicated(x.sharding.mesh))
        piece.block_until_ready()  # also where it is not wanted: one at a time
        if out is not None:
            here = (slice(None),) * (axis + 1) + (slice(start, start + rows),)
            out[here] = np.asarray(piece.addressable_data(0))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _piece(x: jax.Array, place: jax.Array, axis, ways, rows, where) -> jax.Array:
    x = _at(x, place[:-1])
    x = x.reshape(*x.shape[:axis], ways, -1, *x.shape[axis + 1 :])
    x = jax.lax.dynamic_slice_in_dim(x, place[-1], rows, axis + 1)
    return jax.lax.with_sharding_constraint(x, where)
