"""The mesh that decodes: devices in the same order, fewer copies moved for each token.

Training cuts the parameters over fsdp and gathers a layer's when it comes to it. For a
token a row that would be all of the model on the wire for each token. So for a rollout
the parameters are laid out once, whole or cut over `tensor`, where products leave sums
of activations to be sent and no weights.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jalign.sharding.partition import fitting_spec, join, param_shardings
from jalign.sharding.rules import AXIS_RULES, axes_of

PyTree = Any
_SHARE = 4  # of a device's memory: the rest holds what trains


def decoding_mesh(
    mesh: Mesh | AbstractMesh,
    bytes_on: Callable[[Any], int],
    device_bytes: float | None = None,
) -> Any:
    """The mesh with the smallest `tensor` on which parameters and cache have room.

    Args:
      mesh: of training. Its other axes become rows (data) and more of tensor.
      bytes_on: mesh -> bytes of parameters and cache on a device; ValueError where the
        mesh does not divide them.
      device_bytes: memory of a device, of which a quarter is room; None, where it is
        not known, is without end.

    Returns: a mesh of the same kind, devices and axes, but for data and tensor of
      size 1. Where nothing has
      room, the one that takes least.
    """
    ways = math.prod(mesh.shape.values()) // mesh.shape["tensor"]
    least: tuple[int, Any] | None = None
    for more in (k for k in range(1, ways + 1) if ways % k == 0):
        candidate = _regrouped(mesh, ways // more, more * mesh.shape["tensor"])
        try:
            size = bytes_on(candidate)
        except ValueError:
            continue
        if device_bytes is None or size <= device_bytes / _SHARE:
            return candidate
        least = (size, candidate) if least is None or size < least[0] else least
    return mesh if least is None else least[1]


def _regrouped(mesh: Any, data: int, tensor: int) -> Any:
    shape = data, *(1 for _ in mesh.axis_names[2:]), tensor
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(shape, mesh.axis_names, axis_types=mesh.axis_types)
    devices = mesh.devices.reshape(shape)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def relay(params: PyTree, source: Mesh | None, target: Mesh) -> PyTree:
    """Inside of jit: parameters of one mesh, laid out on its decoding mesh.

    Two moves where the source cuts over fsdp: an exchange among those who share a copy
    of the target's, then a gather over the copies. Asked for both at once the compiler
    gathers all of a leaf and drops what it does not need.
    """
    place = jax.lax.with_sharding_constraint
    if source is not None and source.shape["fsdp"] * source.shape["context"] > 1:
        rules = AXIS_RULES | {"embed": ("data",)}

        def between(path, x):
            spec = fitting_spec(target, x.shape, axes_of(join(path)) or (), rules)
            return NamedSharding(target, spec)

        params = place(params, jax.tree_util.tree_map_with_path(between, params))
    return place(params, param_shardings(target, params))


def device_bytes(mesh: Mesh | None) -> int | None:
    """Memory of one of this process's devices; None where it is not told (a CPU)."""
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    return (devices[0].memory_stats() or {}).get("bytes_limit")


def shard_bytes(shapes: PyTree, shardings: PyTree) -> int:
    """Bytes of a tree on each device."""

    def size(leaf, placed):
        return math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))
