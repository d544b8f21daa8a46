"""A checkpoint's tensors, read to the shards of parameters.

A process that has the mesh to itself reads the slices that its devices hold. Where
processes share it, or the files are remote, each reads blocks of whole rows, and these
once, which the devices exchange: see sharding.blocks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from jalign import sharding
from jalign.models import families, hf_quantized, tensors
from jalign.models.hf_files import WeightFiles
from jalign.models.hf_writing import DTYPES
from jalign.models.model import Model
from jalign.paths import is_remote
from jalign.sharding import blocks

Flat = dict[str, Any]
"""Path, such as "norm/scale" -> the parameter, its shape, or its sharding."""


def read_params(
    files: WeightFiles,
    model: Model,
    shapes: Flat,
    dtype: np.dtype,
    quantize: str | None,
    problems: list[str],
) -> Flat:
    """All parameters, one stacked leaf after the other.

    Args:
      files: whose headers are those of the model.
      model, shapes: what is read, and the shape of each parameter.
      dtype: of what may be narrow, see tensors.is_narrow.
      quantize: see hf_weights.load.
      problems: takes a line for each tensor that this process has found bad.
    """
    if model.mesh is not None:
        # Says what does not fit before anything is read.
        sharding.param_shardings(model.mesh, model.param_shapes())
    params: Flat = {}
    for row in families.tensors_of(model.config):
        shape = shapes[row.path].shape
        inner = shape[row.stacks :]
        tensor = functools.partial(_tensor, files, row.pattern, inner, problems)
        whole = functools.partial(tensor, np.float32, [(0, n) for n in inner])
        leaves = hf_quantized.read(files, row, shape, quantize, whole)
        if leaves is not None:
            for name, x in leaves.items():
                path = f"{row.path}/{name}"
                where = _sharding(model.mesh, path, x.shape)
                params[path] = _placed(where, x.shape, x.__getitem__)
            continue
        own = dtype if tensors.is_narrow(row.path) else np.dtype(np.float32)
        where = _sharding(model.mesh, row.path, shape)
        # Of a disk the slices of all devices are read, and pages twice read are there.
        here = where is None or where.is_fully_addressable
        if where is None or (here and not is_remote(files.folder)):
            read = _leaf_reader(functools.partial(tensor, own), row, shape, own)
            params[row.path] = _placed(where, shape, read)
        else:
            params[row.path] = _exchanged(files, row, shape, own, where, problems)
    return params


def _sharding(
    mesh: Mesh | None, path: str, shape: tuple[int, ...]
) -> NamedSharding | None:
    if mesh is None:
        return None
    tree = unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, sep="/")
    (where,) = jax.tree.leaves(sharding.param_shardings(mesh, tree))
    return where


def _placed(where: NamedSharding | None, shape: tuple[int, ...], read) -> jax.Array:
    """The parameter whose slices `read` gives, where the mesh wants it."""
    if where is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    # Wait, so that the host copy is freed before the next leaf is read.
    return jax.make_array_from_callback(shape, where, read).block_until_ready()


def _exchanged(
    files: WeightFiles,
    row: tensors.Tensor,
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: NamedSharding,
    problems: list[str],
) -> jax.Array:
    """A stacked parameter of which each process reads its share of rows. Collective.

    Beside the shards there is a share of one layer, as the file has it and regrouped.
    """
    left, right = row.pattern.split(" -> ")
    axes, inner = right.split(), shape[row.stacks :]
    sizes = tuple(zip(axes, inner, strict=True))
    outer = [row.stacks + axes.index(axis) for axis, *_ in tensors.groups(left)]
    deal = blocks.deal(where, outer, tensors.file_shape(row.pattern, inner))
    put = _putter(deal, where, row.pattern, sizes)
    out = jnp.zeros(shape, dtype, device=where)
    indices = np.ndindex(*shape[: row.stacks])
    for index, name in zip(indices, row.names(shape), strict=True):
        rows = functools.partial(_rows, files, name, problems)
        dealt = blocks.read(deal, rows, np.dtype(DTYPES[files.dtype(name)]))
        # Wait, so that no more than a layer is on the way.
        out = put(out, dealt, np.asarray(index, np.int32)).block_until_ready()
    return out


@functools.lru_cache(maxsize=256)
def _putter(deal: blocks.Deal, where: NamedSharding, pattern: str, sizes):
    """Jitted (stacked parameter, blocks of a tensor, its index) -> with it at index."""

    def put(stack: jax.Array, dealt: jax.Array, index: jax.Array) -> jax.Array:
        x = einops.rearrange(blocks.join(deal, dealt), pattern, **dict(sizes))
        x = x.astype(stack.dtype).reshape(*(1,) * len(index), *x.shape)
        start = (*index, *(0,) * len(sizes))
        return jax.lax.dynamic_update_slice(stack, x, start)

    return jax.jit(put, donate_argnums=0, out_shardings=where)


def _rows(
    files: WeightFiles, name: str, problems: list[str], start: int, stop: int
) -> np.ndarray:
    """These rows of a tensor; notes a bad one, also one that cannot be read: the other
    processes wait for its rows."""
    try:
        x = files.read(name, (slice(start, stop),))
    except Exception as error:  # of the disk, or of safetensors
        problems.append(f"{name} cannot be read: {error}")
        shape = stop - start, *files.shape(name)[1:]
        return np.zeros(shape, DTYPES[files.dtype(name)])
    return _noted(x, name, problems)


def _noted(x: np.ndarray, name: str, problems: list[str]) -> np.ndarray:
    """x; notes it where it is not finite."""
    if not np.isfinite(x.astype(np.float32, copy=False)).all():
        problems.append(f"{name} is not finite")
    return x


def _tensor(
    files: WeightFiles, pattern: str, shape, problems: list[str], dtype, spans, name
) -> np.ndarray:
    """The part of a tensor that spans of its parameter cover; notes a bad one."""
    x = _read_part(files, name, pattern, shape, spans).astype(dtype, copy=False)
    return _noted(x, name, problems)


def _leaf_reader(
    tensor: Callable[..., np.ndarray], row: tensors.Tensor, shape, dtype
) -> Callable[[Any], np.ndarray]:
    """Index of a stacked parameter -> that slice, read by `tensor`(spans, name).

    Devices that hold the same slice share one read.
    """

    @functools.cache
    def read(spans: tuple[tuple[int, int], ...]) -> np.ndarray:
        counted, inner = spans[: row.stacks], spans[row.stacks :]
        out = np.empty([stop - start for start, stop in spans], dtype)
        for place in np.ndindex(*(stop - start for start, stop in counted)):
            index = [i + start for i, (start, _) in zip(place, counted, strict=True)]
            out[place] = tensor(inner, row.name.format(*index))
        return out

    def at(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return read(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    return at


def _read_part(files: WeightFiles, name: str, pattern: str, shape, spans):
    """The part of a tensor that spans of its parameter cover, regrouped as that is."""
    left, right = pattern.split(" -> ")
    sizes = dict(zip(right.split(), shape, strict=True))
    span_of = dict(zip(right.split(), spans, strict=True))
    cut, parts = [], {}
    for outer, *rest in tensors.groups(left):
        # Of a group such as (n h) the outer axis is cut while it is read.
        width = math.prod(sizes[axis] for axis in rest)
        start, stop = span_of.pop(outer)
        cut.append(slice(start * width, stop * width))
        parts |= {outer: stop - start} | {axis: sizes[axis] for axis in rest}
    x = einops.rearrange(files.read(name, tuple(cut)), pattern, **parts)
    return x[tuple(slice(*span_of.get(axis, (None,))) for axis in right.split())]
