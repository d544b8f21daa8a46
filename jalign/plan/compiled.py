"""What the compiler says of the real step: its memory, its traffic and its cycles."""

import dataclasses
import re
from typing import Any

import jax

from jalign import sharding
from jalign.models import ModelConfig
from jalign.plan.collectives import collectives
from jalign.plan.estimate import Plan, Row
from jalign.plan.module_seconds import speed_of_module
from jalign.plan.recipes import compiled_step
from jalign.plan.work import Part

_NEEDS = re.compile(r"\(([\d.]+)G\) exceeds available HBM|Used ([\d.]+)G of ")


def with_compiled(plan: Plan, model_config: ModelConfig, topology: str | None) -> Plan:
    """The plan with what the compiler lays out for its step.

    Where the compiler gives up for want of memory: only what it says that it needs.
    Raises: ValueError as sharding.topology_devices.
    """
    devices = sharding.topology_devices(topology)
    mesh = sharding.make_mesh(devices=devices, **plan.mesh)
    try:
        compiled = compiled_step(plan.config, model_config, mesh)
    except jax.errors.JaxRuntimeError as error:
        needs = _NEEDS.search(str(error))
        if needs is None:
            raise
        size = int(float(needs[1] or needs[2]) * 2**30)
        row = Row("at least", size, "the compiler gives up: it does not fit")
        return dataclasses.replace(plan, compiled=(row,))
    text = compiled.as_text()
    return dataclasses.replace(
        plan,
        compiled=memory_of(compiled),
        compiled_sent=sent_by_kind(text),
        compiled_speed=speed_of_module(text, plan.work, plan.machine),
    )


def memory_of(compiled: Any) -> tuple[Row, ...]:
    """Bytes on each device, as the compiler lays them out.

    Of temporaries what is alive at once: temp_size_in_bytes counts buffers that take
    turns, and is larger than the memory of a chip that the step compiles for.
    """
    memory = compiled.memory_analysis()
    given, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    alive = getattr(memory, "peak_memory_in_bytes", 0) - given - outputs
    return (
        Row("arguments", given, "parameters, moments, batch"),
        Row("outputs", outputs, "not in place of arguments"),
        Row(
            "temporaries",
            alive if 0 < alive < temporaries else temporaries,
            "gradients, activations, ...",
        ),
        Row("program", memory.generated_code_size_in_bytes, ""),
    )


def sent_by_kind(text: str) -> tuple[Part, ...]:
    """Bytes that a device sends in collectives, by their kind."""
    sent: dict[str, list[float]] = {}
    for one in collectives(text):
        kind = sent.setdefault(one.kind, [0, 0])
        kind[0] += one.bytes
        kind[1] += one.runs
    return tuple(
        Part(kind, size, f"{runs} runs") for kind, (size, runs) in sent.items()
    )
