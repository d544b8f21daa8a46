"""A compiled module as text, `compiled.as_text()`, read into computations of lines."""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(|=).*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
Shape = tuple[str, tuple[int, ...]]


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

    @property
    def operands(self) -> list[str]:
        """Names of the lines that it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def where(self) -> str:
        """What jax calls the op that it is for (op_name)."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    def attribute(self, name: str) -> str:
        """The computation that an attribute names.

        Raises: ValueError where there is none.
        """
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        if found is None:
            raise ValueError(f"text: {self.name}, a {self.op}, has no {name}")
        return found[1]

    @property
    def sides(self) -> list[str]:
        """The computations that a conditional chooses among."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if found is None:
            return [self.attribute(f"{side}_computation") for side in ("true", "false")]
        return re.findall(r"%([\w.\-]+)", found[1])


Module = Mapping[str, list[Instruction]]


def read(text: str) -> tuple[Module, str]:
    """(computation -> its lines in their order, the name of the first computation).

    Raises: ValueError where the text is no module's.
    """
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("text: no ENTRY computation, so not a compiled module's")
    module: dict[str, list[Instruction]] = {}
    here: list[Instruction] = []
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            here = module.setdefault(start[1], [])
        elif found := _INSTRUCTION.match(line):
            here.append(Instruction(*found.groups()))
    return module, entry[1]


def shapes_in(text: str) -> list[Shape]:
    """(dtype, dimensions) of each array in a shape, of a tuple of all of them."""
    return [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text)
        if dtype in BYTES
    ]


def bytes_of(*shapes: Shape) -> int:
    """Of arrays together."""
    return sum(BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)


def trips(module: Module, loop: Instruction) -> int:
    """How often a loop's body runs, 1 where it cannot be read.

    libtpu does not write it down: a loop's condition compares a counter that starts at
    0 with a constant, and its body adds another to it.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = {x.name: x for x in module[loop.attribute("condition")]}
    body = {x.name: x for x in module[loop.attribute("body")]}
    compare = next((x for x in condition.values() if x.op == "compare"), None)
    if compare is None:
        return 1
    counter, bound = (condition[name] for name in compare.operands)
    index, limit = re.search(r"index=(\d+)", counter.rest), _constant(bound)
    if index is None or limit is None:
        return 1
    last = next((x for x in reversed(body.values()) if x.op == "tuple"), None)
    step = body.get(last.operands[int(index[1])]) if last else None
    added = [_constant(body[x]) for x in step.operands if x in body] if step else []
    return math.ceil(limit / next(filter(None, added), 1))


def _constant(line: Instruction) -> int | None:
    found = re.match(r"(\d+)\)", line.rest)
    return int(found[1]) if line.op == "constant" and found else None
