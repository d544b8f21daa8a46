"""Meshes with axes data, fsdp, context and tensor; and machines that are not here."""

import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

MESH_AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices; all of its axes are Auto, whatever jax's default is.

    Args:
      data: number of whole copies of the parameters; each takes other rows.
      fsdp: number of shards that parameters and rows are both cut into.
      context: number of shards of each row's time, for rows of very many tokens;
        parameters are cut over it too.
      tensor: number of shards of heads, mlp and vocabulary; keep it inside a host.
        One of them may be -1: the devices that the others leave.
      devices: the jax devices to use; every device of every process when None.

    Returns: Mesh with axes "data", "fsdp", "context", "tensor", also where one is 1.
    Raises: ValueError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    sizes = _fill(sizes, len(devices))
    shape, types = tuple(sizes.values()), (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # a torus: 8 x 8 of 4 x 4 x 4 chips share an axis of it
        how = {"devices": devices, "allow_split_physical_axes": True}
        placed = mesh_utils.create_device_mesh(shape, **how)
        return Mesh(placed, MESH_AXES, axis_types=types)


def abstract_mesh(
    num_devices: int,
    *,
    data: int = 1,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
) -> AbstractMesh:
    """make_mesh's mesh without devices: to compute the layout for another machine.

    param_shardings and state_shardings take it; arrays cannot be placed on it.

    Raises: ValueError as make_mesh does.
    """
    sizes = dict(data=data, fsdp=fsdp, context=context, tensor=tensor)
    sizes = _fill(sizes, num_devices)
    return AbstractMesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def _fill(sizes: dict[str, int], num_devices: int) -> dict[str, int]:
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
        tensor = math.gcd(max(1, sizes["tensor"]), num_devices)
        raise ValueError(
            f"mesh {shown}: {fixed} {'does not divide' if free else 'is not'} the "
            f"number of devices, {num_devices}; what fits is "
            f"data=1,fsdp={num_devices // tensor},tensor={tensor}"
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


# kind -> (GiB of memory of one device, devices of one chip). Sources: the TPU pages of
# cloud.google.com/tpu/docs/system-architecture-tpu-vm, NVIDIA's data sheets.
KINDS = {
    "v2": (8, 2),
    "v3": (16, 2),
    "v4": (32, 1),
    "v5e": (16, 1),
    "v5p": (95, 1),
    "v6e": (32, 1),
    "t4": (16, 1),
    "l4": (24, 1),
    "a100-40gb": (40, 1),
    "a100-80gb": (80, 1),
    "h100": (80, 1),
    "h200": (141, 1),
    "b200": (180, 1),
}


class Machine(NamedTuple):
    """A set of equal devices.

    Attributes:
      kind: "v5e", or jax's name for the devices here.
      num_devices: over all hosts.
      device_bytes: memory of one device; None where it is not known (a CPU).
    """

    kind: str
    num_devices: int
    device_bytes: int | None


def machine(topology: str | None = None) -> Machine:
    """The machine that "v5e:4x4", "v5p:4x4x4" or "h100:8" names; None is this one.

    Raises: ValueError listing the known kinds.
    """
    if topology is None:
        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        return Machine(device.device_kind, len(jax.devices()), stats.get("bytes_limit"))
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", topology)
    if match is None or match[1] not in KINDS:
        raise ValueError(
            f"topology {topology!r} is not KIND:SHAPE, as v5e:4x4 or h100:8; kinds: "
            f"{', '.join(KINDS)}"
        )
    gib, per_chip = KINDS[match[1]]
    chips = math.prod(int(size) for size in match[2].split("x"))
    return Machine(match[1], chips * per_chip, gib * 2**30)


def topology_devices(topology: str | None) -> list:
    """Devices to compile for: those here, or libtpu's description of a TPU slice.

    The described ones hold no arrays; a mesh of them is for `lower(...).compile()`.

    Raises: ValueError where libtpu is not installed or does not know the topology.
    """
    if topology is None:
        return jax.devices()
    from jax.experimental import topologies

    # Only libtpu reads it, in C: it must not ask the cloud about a TPU that is not
    # here. putenv leaves os.environ as it is.
    os.putenv("TPU_SKIP_MDS_QUERY", "1")
    how: dict[str, Any] = {"platform": "tpu", "topology_name": topology}
    sides = [int(side) for side in re.findall(r"\d+(?=x|$)", topology)]
    if math.prod(sides) < 4:  # a part of a host, which is 2 x 2 chips
        how["chips_per_host_bounds"] = (*sides, 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(**how)
    except Exception as error:
        raise ValueError(
            f"cannot compile for topology {topology!r} ({error}): it must be a TPU "
            "slice, and libtpu installed (pip install 'jalign[plan]')"
        ) from error
    return list(found.devices)
