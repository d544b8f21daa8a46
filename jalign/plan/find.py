"""The smallest slice on which a run fits, or the fastest way on a given one.

Everything is tried by arithmetic: every mesh, as few micro-batches as fit, with and
without remat. What the user has set stays as it is; what would change what is learned
(optimizer, dtype) is tried only where it is allowed.
"""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterator
from typing import Any

from jalign import sharding
from jalign.models import ModelConfig
from jalign.paths import located
from jalign.plan.estimate import Plan, estimate
from jalign.plan.published import PUBLISHED
from jalign.plan.recipes import RECIPES, name_of, update_rows
from jalign.plan.text import GIB
from jalign.settings import as_text, check, required
from jalign.sharding.machines import slices
from jalign.train.config import RunConfig

GOALS = ("smallest", "fastest")
ALLOWED = {"optimizer": "adafactor", "dtype": "bfloat16"}
_SEARCHED = ("data", "fsdp", "tensor")
_MOST_TENSOR = 8  # devices that heads are cut over: it stays inside a host
_SHOWN = 5


def find(
    config: RunConfig,
    model_config: ModelConfig,
    topology: str | None,
    goal: str,
    allow: str = "",
) -> Plan:
    """The best plan, with the next best ones as its `found`, and its `command`.

    Args:
      config: of the run; batch_size and max_length stay.
      model_config: of its model.
      topology: a kind alone, as "v5e", for "smallest"; a slice, or None for the devices
        here, for "fastest".
      goal: one of GOALS.
      allow: of ALLOWED, joined by commas.

    Raises: ValueError where nothing fits, saying what came nearest; for a topology that
      does not suit the goal.
    """
    allowed = tuple(filter(None, map(str.strip, allow.split(","))))
    for name in allowed:
        known = " and ".join(ALLOWED)
        check(name in ALLOWED, f"allow {name!r}: --find may be allowed {known}")
    check(goal in GOALS, f"find {goal!r} is not one of {', '.join(GOALS)}")
    whole = topology is not None and ":" not in topology
    wanted = (
        "a kind of chip alone, as v5e" if goal == GOALS[0] else "a slice, as v5e:4x4"
    )
    check(
        whole == (goal == GOALS[0]),
        f"topology {topology}: --find {goal} needs {wanted}",
    )
    nearest, problem = None, ""
    for one in slices(str(topology)) if whole else [topology]:
        tried, why = _tried(config, model_config, one, allowed)
        problem = why or problem
        if fitting := [p for p in tried if p.fits]:
            fitting.sort(key=lambda p: (p.speed.seconds if p.speed else 0.0, p.peak))
            best = dataclasses.replace(fitting[0], command=command_of(fitting[0]))
            return dataclasses.replace(best, found=tuple(fitting[:_SHOWN]))
        nearest = min(
            [*tried, *filter(None, [nearest])], key=lambda p: p.peak, default=None
        )
    if nearest is None:
        raise ValueError(f"--find {goal}: nothing to try on {topology}: {problem}")
    where = f"{nearest.machine.num_devices} x {nearest.machine.kind}"
    raise ValueError(
        f"--find {goal}: nothing fits on {topology}; nearest was {where} with "
        f"{nearest.peak / GIB:.1f} GiB a device; try --allow {','.join(ALLOWED)}, a "
        f"smaller --max-length, adapters (--lora-rank), or another --batch-size"
    )


def _tried(
    config: RunConfig, model_config: ModelConfig, topology: str | None, allowed: Any
) -> tuple[list[Plan], str]:
    """(a plan of each mesh and setting that a run would take, what the others lack)."""
    machine, found, problem = sharding.machine(topology), [], ""
    known = f"--find needs to know the memory of {machine.kind}: give --topology"
    check(machine.device_bytes is not None, known)
    for sizes in _meshes(machine, sharding.parse_mesh(config.mesh)):
        mesh = sharding.abstract_mesh(
            machine.num_devices, slices=machine.slices, **sizes
        )
        cut = {"fsdp": sizes["fsdp"]} | {k: n for k, n in sizes.items() if n > 1}
        spec = ",".join(f"{axis}={size}" for axis, size in cut.items())
        for settings in _settings(config, allowed):
            for parts in _parts(config, sizes["data"] * sizes["fsdp"]):
                given = settings | {"microbatches": parts, "mesh": spec}
                try:
                    changed = _changed(config, given)
                    found.append(estimate(changed, model_config, mesh, machine))
                except ValueError as error:
                    problem = str(error)
                    break
                if found[-1].fits:  # more of them are slower
                    break
    return found, problem


def _meshes(machine: Any, given: dict[str, int]) -> Iterator[dict[str, int]]:
    """Sizes of the axes data, fsdp and tensor; other ones stay as they are given."""
    kept = {axis: n for axis, n in given.items() if axis not in _SEARCHED}
    devices = machine.num_devices // math.prod(kept.values())
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    tensors = [n for n in divisors if n <= _MOST_TENSOR]
    datas = [n for n in divisors if n % machine.slices == 0]
    for tensor, data in itertools.product(tensors, datas):
        if devices % (tensor * data) == 0:
            fsdp = devices // (tensor * data)
            sizes = {"data": data, "fsdp": fsdp, "tensor": tensor} | kept
            if all(size in (-1, sizes[axis]) for axis, size in given.items()):
                yield sizes


def _settings(config: RunConfig, allowed: Any) -> Iterator[dict[str, Any]]:
    compute, optim = config.compute, config.optim
    had = {"optimizer": optim.optimizer, "dtype": compute.dtype}
    choices = [
        dict.fromkeys((now, ALLOWED[name]) if name in allowed else (now,))
        for name, now in had.items()
    ]
    remats = (True,) if compute.remat else (False, True)
    for optimizer, dtype, remat in itertools.product(*choices, remats):
        yield {"optimizer": optimizer, "dtype": dtype, "remat": remat}


def _parts(config: RunConfig, ways: int) -> list[int]:
    """Numbers of micro-batches; the one that the user has set."""
    if config.compute.microbatches > 1:
        return [config.compute.microbatches]
    most = max(1, update_rows(config) // ways)
    return [n for n in range(1, most + 1) if most % n == 0]


def _changed(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The config with these, by their flat names."""

    def replaced(part: Any) -> Any:
        names = {field.name for field in dataclasses.fields(part)}
        return dataclasses.replace(
            part, **{name: settings[name] for name in names & settings.keys()}
        )

    parts = {"optim": replaced(config.optim), "compute": replaced(config.compute)}
    return dataclasses.replace(config, mesh=settings["mesh"], **parts)


def command_of(plan: Plan) -> str:
    """The command line of a plan's run; DATA and OUT are left to fill in, and MODEL
    where it was a name of plan.published."""
    recipe = name_of(plan.config)
    own = RECIPES[recipe].config
    words, told = ["jalign", recipe], _told(own, plan.config)
    if told["model"] in (*PUBLISHED, "config") and not located(told["model"]).exists():
        told["model"] = "MODEL"
    for name, value in told.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [flag, *(shlex.quote(str(as_text(v))) for v in values)]
    return " ".join(words)


def _told(kind: Any, config: Any) -> dict[str, Any]:
    """Flat name -> value of what is not as by default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= _told(field.default_factory, value)
        elif field.name in required(kind):
            found[field.name] = value or field.name.upper()
        elif value != field.default and value is not None:
            found[field.name] = value
    return found
