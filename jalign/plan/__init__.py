"""Will it fit? Memory of each device for a run, computed without running it.

Parameters, optimizer and gradients are exact: jax.eval_shape of the real model and
optimizer, cut by the real sharding rules. Activations are estimates. `compile` asks
the compiler for the real training step, for a TPU slice even on a laptop (libtpu).
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jalign import sharding
from jalign.plan.compiled import compile_step
from jalign.plan.estimate import estimate
from jalign.plan.table import Plan, PlanConfig, Row

__all__ = ["Plan", "PlanConfig", "Row", "plan", "run_plan"]


def plan(model: str | dict | Any, **settings) -> Plan:
    """The memory plan of a run.

    Args:
      model: a directory, a hub id, the path of a config.json, an HF config as a dict,
        or a models.ModelConfig.
      settings: the other fields of PlanConfig.

    Returns: Plan; `print` shows its table.
    Raises: ValueError as the training command would: mesh, divisibility, settings.
    """
    name = model if isinstance(model, str) else "config"
    return _plan(PlanConfig(model=name, **settings), _model_config(model))


def run_plan(config: PlanConfig) -> str:
    """The table for `jalign plan`."""
    return str(_plan(config, _model_config(config.model)))


def _plan(config: PlanConfig, model_config) -> Plan:
    machine = sharding.machine(config.topology)
    sizes = sharding.parse_mesh(config.mesh)
    mesh = sharding.abstract_mesh(machine.num_devices, **sizes)
    result = estimate(config, model_config, mesh, machine)
    if config.compile:
        devices = sharding.topology_devices(config.topology)
        real = sharding.make_mesh(devices=devices, **sizes)
        compiled = compile_step(config, model_config, real)
        result = dataclasses.replace(result, compiled=compiled)
    if result.fits is False:
        advice = _advice(config, model_config, result)
        result = dataclasses.replace(result, advice=advice)
    return result


def _model_config(model):
    """ModelConfig of what `plan` takes; of a hub model only config.json is fetched."""
    from jalign.models import ModelConfig
    from jalign.models.hf_config import config_from_hf, read_config

    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, dict):
        return config_from_hf(model)
    path = Path(model, "config.json") if Path(model).is_dir() else Path(model)
    if not path.is_file():
        path = _hub_file(model)
    return read_config(path)


def _hub_file(model: str) -> Path:
    from transformers.utils import cached_file  # pyright: ignore

    try:
        return Path(str(cached_file(model, "config.json")))
    except OSError as error:
        raise FileNotFoundError(
            f"model {model!r}: no config.json there or on the hub ({error})"
        ) from error


def _advice(config, model_config, current: Plan) -> str:
    """The nearest setting whose estimate fits."""
    mesh = sharding.abstract_mesh(math.prod(current.mesh.values()), **current.mesh)

    def try_(mesh, **changes):
        changed = dataclasses.replace(config, **changes)
        return estimate(changed, model_config, mesh, current.machine).fits

    if not config.remat and try_(mesh, remat=True):
        return "it would fit with --remat"
    per_device = config.batch_size // (current.mesh["data"] * current.mesh["fsdp"])
    for parts in range(config.microbatches + 1, per_device + 1):
        if config.batch_size % parts == 0 and try_(mesh, microbatches=parts):
            return f"it would fit with --microbatches {parts}"
    for factor in (2, 4, 8, 16, 32, 64):
        sizes = current.mesh | {"fsdp": current.mesh["fsdp"] * factor}
        count = math.prod(sizes.values())
        rows = dict(batch_size=config.batch_size * factor)
        try:
            if try_(sharding.abstract_mesh(count, **sizes), **rows):
                return f"it would fit on {count} devices with fsdp={sizes['fsdp']}"
        except ValueError:
            continue
    return "try a smaller max_length, tensor > 1, or optimizer adafactor"
