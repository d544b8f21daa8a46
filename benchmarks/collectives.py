"""What a compiled TPU program sends between chips, read off its text.

A collective stands in the text once, wherever it runs: bytes are multiplied by the
trips of the loops around it, which libtpu does not write down; they follow from what a
loop's condition compares and what its body adds.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(|=).*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


class Instruction(NamedTuple):
    """A line of a module.

    Attributes:
      name: without its %.
      shape: of the result, as text.
      op: such as "fusion".
      rest: operands and attributes, as text.
    """

    name: str
    shape: str
    op: str
    rest: str


class Collective(NamedTuple):
    """One collective of a program, with all of its runs.

    Attributes:
      kind: one of KINDS.
      bytes: that a chip sends, over all runs.
      runs: how often.
      shapes: (dtype, dimensions) of the results.
      where: what jax calls the op that it is for (op_name), or the loop around it.
    """

    kind: str
    bytes: float
    runs: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    where: str

    @property
    def part(self) -> str:
        """ "layers", "unembedding" or "embedding", by jax's name; else "rest"."""
        if "/embed/" in self.where:
            return "embedding"
        if "Decoder" in self.where:
            return "layers"
        return "unembedding" if "jvp(" in self.where else "rest"


def collectives(text: str) -> list[Collective]:
    """All collectives of a module, `compiled.as_text()`, in the order of the text."""
    module = _computations(text)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("text: no ENTRY computation, so not a compiled module's")
    return list(_walk(module, entry[1], 1))


def _computations(text: str) -> dict[str, list[Instruction]]:
    module: dict[str, list[Instruction]] = {}
    here: list[Instruction] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = module.setdefault(start[1], [])
        elif found := _INSTRUCTION.match(line):
            here.append(Instruction(*found.groups()))
    return module


def _walk(
    module: Mapping[str, list[Instruction]], name: str, runs: int, around: str = ""
) -> Iterator[Collective]:
    seen: set[str] = set()
    for line in module.get(name, ()):
        kind, inside = line.op.removesuffix("-start"), _op_name(line) or around
        if kind in KINDS:
            yield _collective(kind, line, line.shape, runs)._replace(where=inside)
        elif line.op == "while":
            body = _attribute(line, "body")
            yield from _walk(module, body, runs * _trips(module, line), inside)
        elif line.op == "conditional":
            # What a step runs where nothing is left out: the larger side.
            sides = [[*_walk(module, side, runs, inside)] for side in _called(line)]
            yield from max(sides, key=lambda side: sum(c.bytes for c in side))
        elif line.op == "fusion":
            for found in _in_fusion(module, line, runs, seen):
                yield found._replace(where=found.where or inside)
        elif line.op == "call":
            yield from _walk(module, _attribute(line, "to_apply"), runs, inside)


def _in_fusion(
    module: Mapping[str, list[Instruction]],
    fusion: Instruction,
    runs: int,
    seen: set[str],
) -> Iterator[Collective]:
    """A collective that several fusions carry on, for products to hide it, is one: they
    repeat its channel."""
    for line in module.get(_attribute(fusion, "calls"), ()):
        kind = line.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=(\d+)", line.rest)
        if channel is None or channel[1] not in seen:
            # An all-reduce of which the fusion keeps a part is a reduce-scatter.
            scattered = "calls=%all-reduce-scatter" in fusion.rest
            if scattered and kind == "all-reduce":
                yield _collective("reduce-scatter", line, fusion.shape, runs)
            else:
                yield _collective(kind, line, line.shape, runs)
        seen.update(channel.groups() if channel else ())


def _trips(module: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    """How often a loop's body runs: its condition compares a counter that starts at 0
    with a constant, and its body adds another to it; 1 where it reads otherwise."""
    condition = {x.name: x for x in module[_attribute(loop, "condition")]}
    body = {x.name: x for x in module[_attribute(loop, "body")]}
    compare = next((x for x in condition.values() if x.op == "compare"), None)
    if compare is None:
        return 1
    counter, bound = (condition[name] for name in _operands(compare)[:2])
    index, limit = re.search(r"index=(\d+)", counter.rest), _constant(bound)
    if index is None or limit is None:
        return 1
    last = [x for x in body.values() if x.op == "tuple"][-1]
    step = body.get(_operands(last)[int(index[1])])
    added = [_constant(body[x]) for x in _operands(step) if x in body] if step else []
    return math.ceil(limit / next(filter(None, added), 1))


def _operands(line: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", line.rest.partition(")")[0])


def _constant(line: Instruction) -> int | None:
    found = re.match(r"(\d+)\)", line.rest)
    return int(found[1]) if line.op == "constant" and found else None


def _collective(kind: str, line: Instruction, shape: str, runs: int) -> Collective:
    shapes = tuple(
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(shape)
        if dtype in _BYTES
    )
    if line.op.endswith("-start"):
        # (operands, results, and for some a context of scalars)
        large = [x for x in shapes if x[1]]
        shapes = tuple(large[len(large) // 2 :])
    size = sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)
    n = _group_size(line.rest)
    factor = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,  # of what is left of it
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "collective-permute": 1,
    }[kind]
    return Collective(kind, size * factor * runs, runs, shapes, _op_name(line))


def _op_name(line: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', line.rest)
    return found[1] if found else ""


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
    return 2


def _called(line: Instruction) -> list[str]:
    found = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
    if found is None:
        return [_attribute(line, f"{side}_computation") for side in ("true", "false")]
    return re.findall(r"%([\w.\-]+)", found[1])


def _attribute(line: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", line.rest)
    if found is None:
        raise ValueError(f"text: {line.name}, a {line.op}, has no {name}")
    return found[1]
