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

PIECE_BYTES = 2**22
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
      cuts: mesh axes that cut each axis of the tensor in the end, as the parameter's.
      spare: mesh axes that cut none of them.
    """

    shape: tuple[int, ...]
    parts: int
    blocks: int
    rows: int
    place: NamedSharding
    cuts: tuple[tuple[str, ...], ...]
    spare: tuple[str, ...]


def deal(target: NamedSharding, axes: Sequence[int], shape: tuple[int, ...]) -> Deal:
    """Deals a file's tensor to the devices that will hold the parameter.

    Blocks follow the mesh's order of devices, so that a process has neighbours, but for
    the mesh axes that cut the rows of the parameter too, which come first.

    Args:
      target: of the parameter.
      axes: for each axis of the tensor, the axis of the parameter that it begins with.
      shape: of the tensor.
    """
    mesh, all_cuts = target.mesh, _cuts(target)
    cuts = tuple(all_cuts[axis] if axis < len(all_cuts) else () for axis in axes)
    inner = tuple(name for names in cuts[1:] for name in names)
    spare = tuple(n for n in mesh.axis_names if n not in (*cuts[0], *inner))
    parts = math.prod(mesh.shape[name] for name in cuts[0])
    blocks = mesh.size // parts
    place = PartitionSpec((*cuts[0], *spare, *inner))
    rows = -(-shape[0] // (parts * blocks))
    where = NamedSharding(mesh, place)
    return Deal(shape, parts, blocks, rows, where, cuts, spare)


def _cuts(where: NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes that cut each axis of an array, up to the last that is cut."""
    parts = ((part,) if isinstance(part, str) else part or () for part in where.spec)
    return [tuple(n for n in part if where.mesh.shape[n] > 1) for part in parts]


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

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
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
    """The tensor, of what `read` gives; cut as the parameter is. Inside of a jit.

    Said by hand: asked for the layout only, the compiler may gather all of the tensor
    on every device.
    """

    def exchange(x: jax.Array) -> jax.Array:
        for axis, names in reversed([*enumerate(dealt.cuts)][1:]):
            if names:  # columns for rows
                x = jax.lax.all_to_all(x, names, axis, 0, tiled=True)
        if math.prod(dealt.place.mesh.shape[name] for name in dealt.spare) > 1:
            x = jax.lax.all_gather(x, dealt.spare, tiled=True)
        return x[: dealt.shape[0] // dealt.parts]

    return jax.shard_map(
        exchange,
        mesh=dealt.place.mesh,
        in_specs=dealt.place.spec,
        out_specs=PartitionSpec(*(names or None for names in dealt.cuts)),
        check_vma=False,
    )(blocks)


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
    size, ways = local[axis], shape[axis] // local[axis]
    row_bytes = math.prod(shape) // size * x.dtype.itemsize
    rows = min(max(PIECE_BYTES // row_bytes, 1), size)
    if out is not None:
        out = out.reshape(*shape[:axis], ways, size, *shape[axis + 1 :])
    for start in range(0, size, rows):
        start = min(start, size - rows)  # the last one is as large: compiled once
        place = np.asarray([*index, start], np.int32)
        piece = _piece(x, place, axis, rows, x.sharding)
        piece.block_until_ready()  # also where it is not wanted: one at a time
        if out is not None:
            here = (slice(None),) * (axis + 1) + (slice(start, start + rows),)
            out[here] = np.asarray(piece.addressable_data(0)).reshape(out[here].shape)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _piece(
    x: jax.Array, place: jax.Array, axis: int, rows: int, where: NamedSharding
) -> jax.Array:
    """On every device x[*index], and of that, along an axis, rows [start, start + rows)
    of each shard, one after the other; place is (*index, start)."""
    first = len(place) - 1

    def gathered(x: jax.Array, place: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(_at(x, place[:-1]), place[-1], rows, axis)
        for number, names in enumerate(_cuts(where)[first:]):
            if names:
                x = jax.lax.all_gather(x, names, axis=number, tiled=True)
        return x

    return jax.shard_map(
        gathered,
        mesh=where.mesh,
        in_specs=(where.spec, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(x, place)
