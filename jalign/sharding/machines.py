"""Machines, here or not: their devices, how fast these are, and what joins them."""

import math
import os
import re
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """One device of a kind, as its vendor publishes it.

    Attributes:
      gib: memory, GiB.
      flops: dense products of bfloat16, FLOP/s.
      hbm: of that memory, bytes/s.
      link: of one link to a neighbour, or of the switch that a host has, bytes/s, one
        way.
      torus: links form a grid of so many dimensions; 0: hosts with a switch.
      wraps: a side of the grid that is a multiple of this is a ring; others are lines.
      per_chip: devices of one chip, which share its links.
      clock: of what TPU compilers count in, cycles/s.
      names: how jax's device_kind starts.
    """

    gib: int
    flops: float
    hbm: float
    link: float
    torus: int = 0
    wraps: int = 0
    per_chip: int = 1
    clock: float = 0.0
    names: tuple[str, ...] = ()


HOST = 8  # GPUs that share a switch
_LONGEST = 16  # chips along a side of a slice
BETWEEN_SLICES = 6.25e9  # bytes/s of a TPU chip to other slices: 50 Gbit/s of v5p
NETWORK = 50e9  # bytes/s of a GPU to other hosts, one way: 400 Gbit/s

# Sources: the TPU pages of cloud.google.com/tpu/docs/system-architecture-tpu-vm, "How
# to scale your model" (jax-ml.github.io/scaling-book/tpus), NVIDIA's data sheets.
KINDS = {
    "v2": Chip(8, 22.5e12, 3.5e11, 6.2e10, 2, 16, 2, 0.7e9, ("TPU v2",)),
    "v3": Chip(16, 61.5e12, 4.5e11, 8.2e10, 2, 16, 2, 0.94e9, ("TPU v3",)),
    "v4": Chip(32, 275e12, 1.2e12, 4.5e10, 3, 4, 1, 1.05e9, ("TPU v4",)),
    "v5e": Chip(
        *(16, 197e12, 8.1e11, 4.5e10, 2, 16, 1, 1.5e9), ("TPU v5 lite", "TPU v5e")
    ),
    "v5p": Chip(95, 459e12, 2.765e12, 9e10, 3, 4, 1, 1.75e9, ("TPU v5",)),
    "v6e": Chip(
        *(32, 918e12, 1.64e12, 9e10, 2, 16, 1, 1.75e9), ("TPU v6 lite", "TPU v6e")
    ),
    "tpu7x": Chip(96, 1153.5e12, 3.69e12, 1e11, 3, 4, 2, 2.2e9, ("TPU7x",)),
    "t4": Chip(16, 65e12, 3.2e11, 1.6e10, names=("Tesla T4",)),
    "l4": Chip(24, 121e12, 3e11, 3.2e10, names=("NVIDIA L4",)),
    "a100-80gb": Chip(
        80, 312e12, 2.04e12, 3e11, names=("NVIDIA A100-SXM4-80", "NVIDIA A100 80")
    ),
    "a100-40gb": Chip(40, 312e12, 1.56e12, 3e11, names=("NVIDIA A100",)),
    "h100": Chip(80, 989e12, 3.35e12, 4.5e11, names=("NVIDIA H100",)),
    "h200": Chip(141, 989e12, 4.8e12, 4.5e11, names=("NVIDIA H200",)),
    "b200": Chip(180, 2250e12, 8e12, 9e11, names=("NVIDIA B200",)),
}


class Machine(NamedTuple):
    """A set of equal devices.

    Attributes:
      kind: of KINDS, as "v5e"; of others, here, jax's name for them.
      num_devices: over all hosts.
      device_bytes: memory of one device; None where it is not known (a CPU).
      chip: how fast a device is; None where it is not known.
      sides: chips along each side of a slice, as (4, 4).
      slices: that are joined by a network only.
    """

    kind: str
    num_devices: int
    device_bytes: int | None
    chip: Chip | None = None
    sides: tuple[int, ...] = ()
    slices: int = 1

    def bandwidth(self, ways: int, *, inner: bool = False) -> float:
        """Bytes/s that a device sends, one way, in collectives of `ways` devices.

        On a grid they lie along its first sides, or with `inner` along its last. A
        line serves them with a link, a ring with two, as collectives go around both
        ways; several sides at once ("How to scale your model", Sharded Matrices).

        Raises: ValueError where the chip is not known.
        """
        if self.chip is None:
            raise ValueError(f"nothing is known of the links of {self.kind}")
        chip = self.chip
        if not chip.torus:
            return chip.link if ways <= HOST else NETWORK
        cubes = all(side % chip.wraps == 0 for side in self.sides)
        links, left = 0, max(1, ways // chip.per_chip)
        for side in reversed(self.sides) if inner else self.sides:
            part = math.gcd(left, side)
            ring = side % chip.wraps == 0 and (chip.torus == 2 or cubes)
            links += 0 if part == 1 else 2 if part == side and ring else 1
            left //= part
        return max(1, links) * chip.link / chip.per_chip


def chip_of(device_kind: str) -> Chip | None:
    """What is known of devices that jax calls so, as "TPU v5 lite"; None: nothing."""
    found = (chip for chip in KINDS.values() if device_kind.startswith(chip.names))
    return next(found, None)


def machine(topology: str | None = None) -> Machine:
    """The machine that "v5e:4x4", "v5p:4x4x4" or "h100:8" names; None is this one.

    "2*v5e:16x16" is two slices.

    Raises: ValueError listing the known kinds.
    """
    if topology is None:
        device, count = jax.local_devices()[0], len(jax.devices())
        stats = device.memory_stats() or {}
        at = [getattr(d, "coords", (n,)) for n, d in enumerate(jax.devices())]
        sides = tuple(1 + max(side) - min(side) for side in zip(*at, strict=True))
        chip, name = chip_of(device.device_kind), device.device_kind
        kind = next((k for k, known in KINDS.items() if known is chip), name)
        apart = len({slice_of(d) for d in jax.devices()})
        return Machine(kind, count, stats.get("bytes_limit"), chip, sides, apart)
    match = re.fullmatch(r"(?:([1-9]\d*)\*)?([a-z0-9-]+):(\d+(?:x\d+)*)", topology)
    if match is None or match[2] not in KINDS:
        raise ValueError(
            f"topology {topology!r} is not KIND:SHAPE, as v5e:4x4 or h100:8, or of "
            f"several slices, as 2*v5e:16x16; kinds: {', '.join(KINDS)}"
        )
    chip, sides = KINDS[match[2]], tuple(map(int, match[3].split("x")))
    apart = int(match[1] or 1)
    devices = apart * math.prod(sides) * chip.per_chip
    return Machine(match[2], devices, chip.gib * 2**30, chip, sides, apart)


def slice_of(device: Any) -> int:
    """The number of a TPU's slice; 0 for other devices."""
    return getattr(device, "slice_index", 0)


def slices(kind: str) -> list[str]:
    """The topologies of a kind that can be had, the smallest first, as "v5e:2x4".

    Raises: ValueError listing the known kinds.
    """
    if kind not in KINDS:
        raise ValueError(f"topology {kind!r} is not one of {', '.join(KINDS)}")
    chip = KINDS[kind]
    if not chip.torus:
        return [f"{kind}:{2**n}" for n in range(13)]
    found, sides = ["1x1"] if kind in ("v5e", "v6e") else [], [2, 2, 1][: chip.torus]
    while True:
        found.append("x".join(map(str, sides)))
        if min(sides) == _LONGEST:
            return [f"{kind}:{shape}" for shape in found]
        sides[max(i for i, side in enumerate(sides) if side == min(sides))] *= 2


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
    count, _, name = topology.rpartition("*")
    how: dict[str, Any] = {"platform": "tpu", "topology_name": name}
    if count:
        how["num_slices"] = int(count)
    sides = [int(side) for side in re.findall(r"\d+(?=x|$)", name)]
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
