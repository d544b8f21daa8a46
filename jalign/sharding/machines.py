"""Machines that are not here: their sizes, and a TPU slice to compile for."""

import math
import os
import re
from typing import NamedTuple

import jax

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
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        raise ValueError(
            f"cannot compile for topology {topology!r} ({error}): it must be a TPU "
            "slice, and libtpu installed (pip install 'jalign[plan]')"
        ) from error
    return list(found.devices)
