"""Meshes with the axes data, fsdp, context and tensor."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jalign.sharding.machines import slice_of

MESH_AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices; all of its axes are Auto, whatever jax's default is.

    Args:
      data: number of whole copies of the parameters; each takes other rows. None: one
        for each TPU slice; data alone crosses the network between slices, and XLA adds
        up gradients in each of them first.
      fsdp: number of shards that parameters and rows are both cut into.
      context: number of shards of each row's time, for rows of very many tokens;
        parameters are cut over it too.
      tensor: number of shards of heads, mlp and vocabulary; keep it inside a host.
        One of them may be -1: the devices that the others leave.
      devices: the jax devices to use; every device of every process when None.

    Returns: Mesh with axes "data", "fsdp", "context", "tensor", also where one is 1.
    Raises: ValueError where the sizes do not multiply to the number of devices, or
      data is no multiple of the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({slice_of(device) for device in devices})
    data = slices if data is None else data
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    sizes = _fill(sizes, len(devices), slices)
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(MESH_AXES)
    how = {"devices": devices, "allow_split_physical_axes": True}
    if slices > 1:
        within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, between, **how)
        return Mesh(placed, MESH_AXES, axis_types=types)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a torus: 8 x 8 of 4 x 4 x 4 chips share an axis of it
        placed = mesh_utils.create_device_mesh(shape, **how)
        return Mesh(placed, MESH_AXES, axis_types=types)


def abstract_mesh(
    num_devices: int,
    *,
    data: int | None = None,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
    slices: int = 1,
) -> AbstractMesh:
    """make_mesh's mesh without devices: to compute the layout for another machine.

    param_shardings and state_shardings take it; arrays cannot be placed on it.

    Raises: ValueError as make_mesh does.
    """
    data = slices if data is None else data
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    sizes = _fill(sizes, num_devices, slices)
    return AbstractMesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def _fill(sizes: dict[str, int], num_devices: int, slices: int = 1) -> dict[str, int]:
    """Replaces the one -1 and checks that the product is the number of devices."""
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {shown}: at most one axis may be -1")
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {shown}: sizes must be positive (or -1 for one axis)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes = sizes | {free[0]: num_devices // fixed}
    if math.prod(sizes.values()) != num_devices:
        tensor = math.gcd(max(1, sizes["tensor"]), num_devices // slices)
        raise ValueError(
            f"mesh {shown}: {fixed} {'does not divide' if free else 'is not'} the "
            f"number of devices, {num_devices}; what fits is "
            f"data={slices},fsdp={num_devices // slices // tensor},tensor={tensor}"
        )
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh {shown}: the devices are of {slices} slices, and data is to be a "
            "multiple of that: only data crosses the network between slices"
        )
    return sizes


def parse_mesh(spec: str | None) -> dict[str, int]:
    """Reads "fsdp=8,tensor=2" into keyword arguments of make_mesh.

    An axis that is not named keeps make_mesh's default: fsdp takes the devices that
    the others leave. None and "" give {}.

    Raises: ValueError naming the part that is not AXIS=SIZE.
    """
    sizes: dict[str, int] = {}
    for part in (spec or "").replace(" ", "").split(","):
        if not part:
            continue
        name, _, size = part.partition("=")
        if name not in MESH_AXES:
            near = difflib.get_close_matches(name, MESH_AXES, 1) or MESH_AXES[1:2]
            raise ValueError(
                f"mesh {spec!r}: no axis {name!r}; did you mean {near[0]}?"
            )
        if name in sizes:
            raise ValueError(f"mesh {spec!r}: axis {name} is given twice")
        if not size.removeprefix("-").isdecimal() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"mesh {spec!r}: {part!r} is not AXIS=SIZE, as fsdp=8")
        sizes[name] = int(size)
    return sizes
