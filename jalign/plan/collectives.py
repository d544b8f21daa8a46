"""What a compiled TPU program sends between chips, read off its text.

A collective stands in the text once, wherever it runs: bytes are multiplied by the
trips of the loops around it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jalign.plan.hlo import Instruction, Module, Shape, bytes_of, read, shapes_in, trips

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
BETWEEN = "between slices"
"""What the network between slices carries, after a reduction in each of them."""


class Collective(NamedTuple):
    """One collective of a program, with all of its runs.

    Attributes:
      kind: one of KINDS, or BETWEEN.
      bytes: that a chip sends, over all runs.
      runs: how often.
      shapes: (dtype, dimensions) of the results.
      where: what jax calls the op that it is for (op_name), or the loop around it.
      ways: chips that take part.
    """

    kind: str
    bytes: float
    runs: int
    shapes: tuple[Shape, ...]
    where: str
    ways: int

    @property
    def part(self) -> str:
        """ "layers", "unembedding" or "embedding", by jax's name; else "rest"."""
        if "/embed/" in self.where:
            return "embedding"
        if "Decoder" in self.where:
            return "layers"
        return "unembedding" if "jvp(" in self.where else "rest"


def collectives(text: str) -> list[Collective]:
    """All collectives of a module, `compiled.as_text()`, in the order of the text.

    Raises: ValueError where the text is no module's.
    """
    return list(_walk(*read(text), 1))


def kind_of(line: Instruction) -> str | None:
    """One of KINDS, or None; of a pair, its first line has the kind."""
    kind = line.op.removesuffix("-start")
    return kind if kind in KINDS else None


def between_slices(line: Instruction) -> bool:
    """Whether a line sends to another slice: XLA writes it as a send to the host."""
    return line.op == "send" and "megascale" in line.rest


def _walk(
    module: Module,
    name: str,
    runs: int,
    around: str = "",
    seen: set[str] | None = None,
) -> Iterator[Collective]:
    # One that goes on inside of a loop begins before it, once.
    seen = set() if seen is None else seen
    for line in module.get(name, ()):
        inside = line.where or around
        if kind_of(line):
            yield collective(line, runs=runs)._replace(where=inside)
        elif between_slices(line):
            shapes = tuple(shapes_in(line.shape)[:1])
            size = bytes_of(*shapes) * runs
            yield Collective(BETWEEN, size, runs, shapes, inside, 2)
        elif line.op == "while":
            body = line.attribute("body")
            times = runs * trips(module, line)
            yield from _walk(module, body, times, inside, seen)
        elif line.op == "conditional":
            # What a step runs where nothing is left out: the larger side.
            sides = [[*_walk(module, side, runs, inside)] for side in line.sides]
            yield from max(sides, key=lambda side: sum(c.bytes for c in side))
        elif line.op == "fusion":
            for found in in_fusion(module, line, seen, runs):
                yield found._replace(where=found.where or inside)
        elif line.op == "call":
            yield from _walk(module, line.attribute("to_apply"), runs, inside)


def in_fusion(
    module: Module, fusion: Instruction, seen: set[str], runs: int = 1
) -> Iterator[Collective]:
    """The collectives that a fusion begins.

    One that several fusions carry on, for products to hide it, is one: they repeat its
    channel, which is in `seen` then.
    """
    for line in module.get(fusion.attribute("calls"), ()):
        if kind_of(line) is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line.rest)
        if channel is None or channel[1] not in seen:
            # An all-reduce of which the fusion keeps a part is a reduce-scatter.
            scattered = "calls=%all-reduce-scatter" in fusion.rest
            if scattered and kind_of(line) == "all-reduce":
                scatter = line._replace(op="reduce-scatter", shape=fusion.shape)
                yield collective(scatter, runs=runs)
            else:
                yield collective(line, runs=runs)
        seen.update(channel.groups() if channel else ())


def collective(line: Instruction, runs: int = 1) -> Collective:
    """The one that a line of one of KINDS begins."""
    kind, shapes = kind_of(line) or "", tuple(shapes_in(line.shape))
    if line.op.endswith("-start"):
        # (operands, results, and for some a context of scalars)
        large = [x for x in shapes if x[1]]
        shapes = tuple(large[len(large) // 2 :])
    n = _group_size(line.rest)
    factor = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,  # of what is left of it
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }[kind]
    sent = bytes_of(*shapes) * factor * runs
    return Collective(kind, sent, runs, shapes, line.where, n)


def _group_size(rest: str) -> int:
    """Chips that take part in one group of a collective, in each form of the text."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'?([\w]+)'?=(\d+)", found[1]))
        return math.prod(
            int(part or sizes[axis])
            for axis, part in re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?", found[2])
        )
    pairs = dict(re.findall(r"\{(\d+),(\d+)\}", rest))
    here, size = pairs.get("0"), 1
    while here not in (None, "0") and size <= len(pairs):  # around the ring of device 0
        here, size = pairs.get(here), size + 1
    return max(2, size)
