"""Seconds of a compiled TPU step, from its text: cycles, kernels, exposed collectives.

Most fusions carry the compiler's own estimate of their cycles; the rest is taken by a
model, which `speed_of_module` says in its assumptions. A module is a schedule: what
begins in one line and ends in another goes on while the lines between run.
"""

import math
import re
from collections import Counter
from typing import Any

from jalign.plan.collectives import (
    Collective,
    between_slices,
    collective,
    in_fusion,
    kind_of,
)
from jalign.plan.hlo import Instruction, Module, bytes_of, read, shapes_in, trips
from jalign.plan.speed import KERNELS, Speed, speed_of
from jalign.plan.work import Part, Work
from jalign.sharding import Machine
from jalign.sharding.machines import BETWEEN_SLICES

# Of an attention kernel, by its name: products of [T, T, H]; a backward pass has two
# kernels, and both compute the scores again.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
SPLASH |= {name.replace("mha", "mqa"): n for name, n in SPLASH.items()}
LANES = 128  # head dimensions are padded to
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NOTES = {
    "fusions": "by the compiler's cycles",
    "attention": f"kernels, at {KERNELS:.0%} of peak",
    "no estimate": "sorts, gathers: by their bytes",
    "copies": "not hidden",
    "collectives": "not hidden",
    "between slices": f"at {BETWEEN_SLICES / 1e9:g} GB/s a chip, not hidden",
}


def speed_of_module(text: str, work: Work, machine: Machine) -> Speed | None:
    """Of a module, `compiled.as_text()`; None where it holds no cycles (not a TPU's).

    Args:
      text: of the step for these devices.
      work: of the step: its FLOPs, for the MFU.
      machine: what it is compiled for.
    """
    chip = machine.chip
    if chip is None or not chip.clock or not _CYCLES.search(text):
        return None
    module, entry = read(text)
    found = _Schedule(module, machine).seconds(entry)
    hidden = found["sent"] - found["collectives"]
    parts = [Part(name, found[name], note) for name, note in _NOTES.items()]
    words = [
        f"fusions take the compiler's cycles at {chip.clock / 1e9:g} GHz, as often as "
        "their loops run",
        f"attention kernels reach {KERNELS:.0%} of {chip.flops / 1e12:g} TFLOP/s, "
        f"heads padded to {LANES}; half of all pairs of tokens count",
        "collectives go one after another over the links that their devices have, "
        f"{chip.link / 1e9:g} GB/s each way, without latency; what runs meanwhile "
        "hides them",
    ]
    there = [part for part in parts if part.amount]
    meanwhile = [Part("collectives", hidden)] if found["sent"] else []
    return speed_of(work, machine, there, meanwhile, words, compiled=True)


class _Schedule:
    """Times of the computations of a module, each of one run."""

    def __init__(self, module: Module, machine: Machine):
        assert machine.chip is not None
        self.module, self.machine, self.chip = module, machine, machine.chip

    def seconds(self, name: str) -> Counter[str]:
        """By part, as _NOTES; and "sent", of all collectives, hidden or not."""
        lines = self.module.get(name, ())
        found: Any = Counter()
        ends = _Ends()
        last = self._last_of_channels(lines)
        for number, line in enumerate(lines):
            found += self._inside(line)
            found += self._own(line)
            for key, one in self._begun(line, ends):
                found["sent"] += (spent := self._wire(one))
                ends.begin(key, "link", _now(found), spent)
            if line.op in ("copy-start", "slice-start"):
                size = bytes_of(*shapes_in(line.shape)[1:2])
                ends.begin(line.name, "memory", _now(found), size / self.chip.hbm)
            part = "copies" if line.op in ("copy-done", "slice-done") else "collectives"
            for key in (*self._ended(line), *last.get(number, ())):
                found[part] += ends.wait(key, _now(found))
        return found

    def _inside(self, line: Instruction) -> Counter[str]:
        """Of what a line runs."""
        if line.op == "while":
            times = trips(self.module, line)
            once = self.seconds(line.attribute("body"))
            return Counter({part: times * x for part, x in once.items()})
        if line.op == "call":
            return self.seconds(line.attribute("to_apply"))
        if line.op == "conditional":  # the side that leaves nothing out
            sides = [self.seconds(side) for side in line.sides]
            return max(sides, key=lambda side: side.total())
        return Counter()

    def _own(self, line: Instruction) -> Counter[str]:
        if cycles := _CYCLES.search(line.rest):
            return Counter({"fusions": int(cycles[1]) / self.chip.clock})
        if between_slices(line):
            size = bytes_of(*shapes_in(line.shape)[:1])
            return Counter({"between slices": size / BETWEEN_SLICES})
        if "tpu_custom_call" in line.rest:
            return Counter({"attention": self._kernel(line)})
        moved = line.op in ("sort", "reduce-window", "gather", "scatter")
        if moved or line.name.startswith("gather_fusion"):
            size = 2 * bytes_of(*shapes_in(line.shape))
            return Counter({"no estimate": size / self.chip.hbm})
        return Counter()

    def _kernel(self, line: Instruction) -> float:
        """Of an attention kernel by its products; of another by its bytes."""
        given = re.search(r"operand_layout_constraints=\{(.*?\})\}", line.rest)
        arrays = shapes_in(given[1]) if given else []
        name = next((name for name in SPLASH if line.name.startswith(name)), None)
        heads = [
            dims for _, dims in arrays if len(dims) >= 3 and dims[-1] in _sizes(arrays)
        ]
        if name is None or len(heads) < 2:
            return bytes_of(*arrays, *shapes_in(line.shape)) / self.chip.hbm
        *rows, queries, size = heads[0]
        pairs = math.prod(rows) * queries * heads[1][-2] / 2
        flops = SPLASH[name] * 2 * pairs * max(size, LANES)
        return flops / (KERNELS * self.chip.flops)

    def _begun(self, line: Instruction, ends: "_Ends") -> list[tuple[str, Collective]]:
        """(what it ends by, a collective) that begins with a line."""
        if kind_of(line):
            return [(line.name, collective(line))]
        if line.op == "fusion":
            inner = self.module.get(line.attribute("calls"), ())
            keys = dict.fromkeys(_channel(x) or line.name for x in inner if kind_of(x))
            new = [key for key in keys if key not in ends.seen]
            ends.seen.update(keys)
            found = in_fusion(self.module, line, set())
            return [pair for pair in zip(keys, found, strict=True) if pair[0] in new]
        return []

    def _ended(self, line: Instruction) -> list[str]:
        """What has to have ended before the next line."""
        if line.op.endswith("-done"):
            return line.operands[:1]
        return [line.name] if kind_of(line) == line.op else []

    def _last_of_channels(self, lines) -> dict[int, list[str]]:
        """Number of the last line of a computation whose fusion carries a channel."""
        last: dict[str, int] = {}
        for number, line in enumerate(lines):
            if line.op == "fusion":
                for x in self.module.get(line.attribute("calls"), ()):
                    if kind_of(x):
                        last[_channel(x) or line.name] = number
        found: dict[int, list[str]] = {}
        for channel, number in last.items():
            found.setdefault(number, []).append(channel)
        return found

    def _wire(self, one: Collective) -> float:
        """Of a collective alone. In an exchange bytes travel half of a line, or a
        quarter of a ring; the others pass on what they were sent."""
        rate = self.machine.bandwidth(one.ways)
        far = one.ways ** (1 / max(1, len(self.machine.sides))) / 4
        return one.bytes / rate * (max(1.0, far) if one.kind == "all-to-all" else 1.0)


class _Ends:
    """When what has begun will have ended, within a computation.

    Attributes:
      seen: channels of collectives in fusions that have begun.
    """

    def __init__(self):
        self.seen: set[str] = set()
        self._ends: dict[str, float] = {}
        self._free = {"link": 0.0, "memory": 0.0}

    def begin(self, key: str, wire: str, now: float, seconds: float) -> None:
        """What takes so long begins as soon as its wire is free."""
        self._ends[key] = self._free[wire] = max(now, self._free[wire]) + seconds

    def wait(self, key: str, now: float) -> float:
        """Seconds until it ends."""
        return max(0.0, self._ends.pop(key, now) - now)


def _now(found: Any) -> float:
    return math.fsum(found[part] for part in _NOTES)


def _channel(line: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", line.rest)
    return found[1] if found else ""


def _sizes(arrays) -> set[int]:
    """Head sizes: the last dimension of the arrays of rank 4 or, without rows, 3."""
    most = max((len(dims) for _, dims in arrays), default=0)
    return {dims[-1] for dtype, dims in arrays if len(dims) == most and dtype[0] != "s"}
