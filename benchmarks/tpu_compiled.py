"""What the TPU's own compiler says of training steps: memory and traffic of each chip.

    python -m benchmarks.tpu_compiled [NAME ...]

compiles the steps of CASES (all, or those named) for slices that are not here, which
takes a minute or two each, and writes their rows into docs/scale.md. It needs libtpu
(pip install 'jalign[plan]') and no TPU.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jalign import sharding
from jalign.models import ModelConfig
from jalign.models.hf_config import config_from_hf
from jalign.plan.collectives import KINDS, Collective, collectives
from jalign.plan.published import PUBLISHED
from jalign.plan.recipes import RECIPES, compiled_step
from jalign.plan.work import bound
from jalign.train.config import ComputeOptions, RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
BEGIN, END = "<!-- tpu_compiled: begin -->", "<!-- tpu_compiled: end -->"
GIB = 2**30
PARTS = ("layers", "unembedding", "embedding", "rest")
HEADER = ["step", "rows x tokens, mesh", "arguments, GiB", "temporaries", "at once"]
HEADER += [f"{KINDS[0]}, GB", *KINDS[1:], *PARTS, "sent", "bound", "sent / bound"]

MODELS = {
    "1b": config_from_hf(PUBLISHED["llama-3.2-1b"]),
    "8b": config_from_hf(PUBLISHED["llama-3.1-8b"]),
    "70b": config_from_hf(PUBLISHED["llama-3.1-70b"]),
    "405b": config_from_hf(PUBLISHED["llama-3.1-405b"]),
}


class Case(NamedTuple):
    """A training step: of llama-3.x, bf16 products, every block recomputed, AdamW.

    Attributes:
      recipe: a training command.
      model: of MODELS.
      topology: as `jalign plan` takes it.
      mesh: as --mesh.
      batch_size: rows, or pairs, of a step over all chips.
      max_length: tokens of a row.
      microbatches: of a step.
    """

    recipe: str
    model: str
    topology: str
    mesh: str
    batch_size: int
    max_length: int
    microbatches: int = 1

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.model}-{self.topology.replace(':', '-')}"


CASES = (
    Case("sft", "1b", "v5e:2x2", "fsdp=4", 8, 2048),
    Case("sft", "8b", "v5e:4x4", "fsdp=16", 16, 4096),
    Case("dpo", "8b", "v5e:4x4", "fsdp=16", 16, 2048),
    Case("sft", "8b", "v5e:8x8", "fsdp=64", 64, 4096),
    Case("sft", "8b", "v5e:16x16", "fsdp=256", 256, 4096),
    Case("dpo", "70b", "v5e:16x16", "fsdp=256", 256, 2048),
    Case("sft", "8b", "v5p:4x4x4", "fsdp=8,context=8", 8, 131072),
    Case("dpo", "405b", "v5p:4x4x8", "fsdp=64,tensor=2", 256, 2048, 4),
)


class Found(NamedTuple):
    """What the compiler said.

    Attributes:
      case: of what.
      arguments, temporaries: bytes of a chip; of temporaries all, though some of them
        take turns and some only fill what the chip has left.
      peak: bytes that live at once, arguments among them.
      sent: all collectives.
      bound: bytes that a chip must send: every weight in bf16 gathered for the forward
        pass and for the backward pass, and its gradient reduced, once each.
      seconds: that the compilation took.
    """

    case: Case
    arguments: int
    temporaries: int
    peak: int
    sent: list[Collective]
    bound: float
    seconds: float


def config_of(case: Case) -> RunConfig:
    """The run's config, as the command would have it."""
    kind = RECIPES[case.recipe].config
    return kind(
        model=case.model,
        data="",
        out="",
        batch_size=case.batch_size,
        max_length=case.max_length,
        mesh=case.mesh,
        compute=ComputeOptions(case.microbatches, dtype="bfloat16", remat=True),
    )


def measure(case: Case) -> Found:
    """Compiles a case; prints nothing."""
    start, model = time.perf_counter(), MODELS[case.model]
    devices = sharding.topology_devices(case.topology)
    mesh = sharding.make_mesh(devices=devices, **sharding.parse_mesh(case.mesh))
    compiled = compiled_step(config_of(case), model, mesh)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Found(
        case,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        collectives(text),
        bound(
            num_parameters(model) // mesh.shape["tensor"],
            mesh.shape["fsdp"] * mesh.shape["context"],
        ),
        time.perf_counter() - start,
    )


def num_parameters(model: ModelConfig) -> int:
    from jalign.models import Model

    return sum(x.size for x in jax.tree.leaves(Model(model).param_shapes()))


def row(found: Found) -> list[str]:
    """Of the table."""
    case = found.case
    by_kind = {kind: 0.0 for kind in KINDS}
    by_part = {part: 0.0 for part in PARTS}
    for one in found.sent:
        by_kind[one.kind] += one.bytes
        by_part[one.part] += one.bytes
    total = sum(by_kind.values())
    memory = found.arguments, found.temporaries, found.peak
    parts = f", {case.microbatches} micro-batches" if case.microbatches > 1 else ""
    return [
        case.name,
        f"{case.batch_size} x {case.max_length}, {case.mesh}{parts}",
        *(f"{x / GIB:.2f}" for x in memory),
        *(f"{x / 1e9:.2f}" for x in (*by_kind.values(), *by_part.values(), total)),
        f"{found.bound / 1e9:.2f}",
        f"{total / found.bound:.2f}",
    ]


def written(page: str, rows: Iterable[Sequence[str]]) -> str:
    """The page with these rows in its table, in the place of those of the same name.

    Raises: ValueError where the page has no two marker lines.
    """
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: the table goes between {BEGIN} and {END}")
    known = {
        cells[0]: cells
        for line in table.strip().splitlines()[2:]
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    known |= {cells[0]: list(cells) for cells in rows}
    order = [case.name for case in CASES]
    lines = [HEADER, ["---"] * len(HEADER)]
    lines += [known[name] for name in order if name in known]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(names: Sequence[str]) -> None:
    known = {case.name: case for case in CASES}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{unknown[0]!r} is not one of {', '.join(known)}")
    for case in map(known.get, names or known):
        assert case is not None
        found = measure(case)
        print(" | ".join(row(found)), f"({found.seconds:.0f} s)", flush=True)
        PAGE.write_text(written(PAGE.read_text("utf-8"), [row(found)]), "utf-8")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # to trace on; the TPU is described
    main(sys.argv[1:])
