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
from jalign.plan.recipes import compiled_sampling, compiled_step
from jalign.plan.work import Part
from jalign.train.online_config import OnlineConfig

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
        compiled_rollout=_rollout(plan, model_config, mesh),
    )


def _rollout(plan: Plan, model_config: ModelConfig, mesh) -> tuple[Row, ...]:
    """Of the programs that lay the weights out to decode, and sample."""
    if not isinstance(plan.config, OnlineConfig):
        return ()
    programs = compiled_sampling(
        plan.config, model_config, mesh, plan.machine.device_bytes
    )
    rows = []
    for name, program in programs.items():
        memory = program.memory_analysis()
        sent = sum(one.bytes for one in collectives(program.as_text()))
        note = f"sends {sent / 1e9:.3f} GB"
        rows.append(Row(f"{name}: temporaries", memory.temp_size_in_bytes, note))
    if "layout" in programs:
        size = programs["layout"].memory_analysis().output_size_in_bytes
        rows.append(Row("weights to decode with", size, plan.config.compute.dtype))
    return tuple(rows)


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
