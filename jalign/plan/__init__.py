"""Will it fit, and how fast? What a run takes of each device, without running it.

Parameters, optimizer and gradients are exact: jax.eval_shape of the real model and
optimizer, cut by the real sharding rules. Activations are estimates, and so are times,
by a model that the plan states. `compile` asks the compiler for the real training step,
for a TPU slice even on a laptop (libtpu). `find` searches.
"""

import dataclasses
import json as json_format
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jalign import sharding
from jalign.models import Model, ModelConfig
from jalign.models.hf_config import config_from_hf, read_config
from jalign.models.hf_files import is_adapter
from jalign.models.lora import LoraConfig
from jalign.models.peft_config import read_adapter_config
from jalign.models.peft_files import read_lora_config
from jalign.paths import is_remote, located, write_text
from jalign.plan.compiled import with_compiled
from jalign.plan.estimate import Plan, Row, estimate
from jalign.plan.find import find as find_plan
from jalign.plan.published import PUBLISHED
from jalign.plan.recipes import RECIPES, update_rows
from jalign.plan.text import as_data, write_page
from jalign.settings import check, flags_of, nearest, required, settings_or
from jalign.sharding.agreement import gather_objects
from jalign.train.config import LoraOptions, RunConfig
from jalign.train.trained import adapters_of

__all__ = ["Plan", "PlanOptions", "Row", "plan", "recomputed", "run_plan"]

_log = logging.getLogger("jalign")

# Of what a run must be given: a plan takes it, so that it can be asked in the words of
# the run, and does not need it.
_UNREAD = {"data": "", "out": "", "reward": "REWARD_MODEL"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Where the run is to fit, and how closely to look."""

    topology: str | None = None
    """Machine, as v5e:4x4, v5p:4x4x4 or h100:8; unset means the devices here."""
    compile: bool = False
    """Also compile the real step, for the TPU topology or for the devices here."""
    find: Literal["smallest", "fastest"] | None = None
    """Search `mesh`, `microbatches` and `remat`, but for those that are set: for the
    smallest slice of a kind (`topology` v5e), or the fastest way on a slice."""
    allow: str = ""
    """What `find` may change, too, although it changes what is learned:
    "optimizer,dtype" or one of them."""
    json: str | None = None
    """Write all figures to this file; - prints them instead of the table."""
    html: str | None = None
    """Write a page to this file."""

    def __post_init__(self):
        super().__post_init__()  # pyright: ignore
        check(self.find is not None or not self.allow, "allow is for find: set it, too")


def _plan_class(recipe: str) -> Any:
    """The config class of `jalign plan RECIPE`: the recipe's own with PlanOptions."""
    own, kinds = RECIPES[recipe].config, flags_of(RECIPES[recipe].config)
    return dataclasses.make_dataclass(
        own.__name__.replace("Config", "Plan"),
        [
            (name, kinds[name], dataclasses.field(default=_UNREAD[name]))
            for name in required(own)
            if name in _UNREAD
        ],
        bases=(PlanOptions, own),
        namespace={"__doc__": f"Will `jalign {recipe}` fit, and how fast?"},
        frozen=True,
        kw_only=True,
    )


_PLANS = {recipe: _plan_class(recipe) for recipe in RECIPES}
SFTPlan, RewardPlan, DPOPlan, PPOPlan, GRPOPlan = _PLANS.values()


def plan(
    config: RunConfig | str,
    model: str | Mapping | ModelConfig | None = None,
    *,
    topology: str | None = None,
    compile: bool = False,
    find: str | None = None,
    allow: str = "",
    **settings: Any,
) -> Plan:
    """What a run takes of each device: memory, FLOPs, traffic, and how long.

    Args:
      config: the run's, an SFTConfig to a GRPOConfig; or its command, "sft" to "grpo",
        whose settings follow by the flags' names, as in run_sft.
      model: a directory, of a model or of adapters in PEFT's format, a hub id, the path
        of a config.json, an HF config as a dict, a models.ModelConfig, or the name of
        a published model, as "llama-3.1-8b"; None takes the config's.
      topology, compile, find, allow: as in PlanOptions.

    Returns: Plan; `print` shows its table.
    Raises: ValueError as the training command would: mesh, divisibility, settings; and
      as plan.find.find.
    """
    run = _run_config(config, model, settings)
    run, model_config = _opened(run, run.model if model is None else model)
    if find is not None:
        result = find_plan(run, model_config, topology, find, allow)
        if topology is not None:
            sides = "x".join(map(str, result.machine.sides))
            topology = f"{result.machine.kind}:{sides}"
    else:
        machine = sharding.machine(topology)
        sizes = sharding.parse_mesh(run.mesh)
        mesh = sharding.abstract_mesh(
            machine.num_devices, slices=machine.slices, **sizes
        )
        result = estimate(run, model_config, mesh, machine)
    if compile:
        result = with_compiled(result, model_config, topology)
    if result.fits is False:
        advice = _advice(model_config, result)
        result = dataclasses.replace(result, advice=advice)
    return result


def recomputed(config: RunConfig) -> RunConfig:
    """The run, with `remat` where an accelerator has no room for it without.

    The command asks it before it starts (`--no-auto-remat` does not). The machine is
    the one here, or of a plan its topology's; where its memory is not known (a CPU),
    and for `find`, which searches, the run stays as it is. Collective: one process
    that lacks the room decides for all.

    Raises: ValueError, FileNotFoundError: as `plan`.
    """
    topology = getattr(config, "topology", None)
    searches = getattr(config, "find", None) is not None
    if config.compute.remat or searches:
        return config
    short = None
    if sharding.machine(topology).device_bytes is not None:
        found = plan(config, topology=topology)
        short = None if found.fits else (found.peak, found.usable)
    found = next(filter(None, gather_objects(short)), None)
    if found is None:
        return config
    needs, usable = (f"{size / 2**30:.1f}" for size in found)
    _log.info(
        "without --remat this run would take %s GiB of a device's %s: activations are "
        "recomputed in the backward pass (--no-auto-remat keeps them)", needs, usable
    )  # fmt: skip
    compute = dataclasses.replace(config.compute, remat=True)
    return dataclasses.replace(config, compute=compute)


def run_plan(config: Any) -> str:
    """The table for `jalign plan RECIPE`, or its JSON; writes the files asked for."""
    names = ("topology", "compile", "find", "allow")
    result = plan(config, **{name: getattr(config, name) for name in names})
    if config.html is not None:
        write_page(config.html, result)
    if config.json is None:
        return str(result)
    text = json_format.dumps(as_data(result), indent=1)
    if config.json == "-":
        return text
    write_text(located(config.json), text + "\n")
    return str(result)


def _run_config(config: RunConfig | str, model: Any, settings: dict) -> RunConfig:
    """The config that `plan` is given, or of the recipe and the settings given."""
    if not isinstance(config, str):
        return settings_or(type(config), config, settings)
    if config not in _PLANS:
        known, near = ", ".join(_PLANS), nearest(config, _PLANS)
        raise ValueError(f"recipe {config!r} is not one of {known}{near}")
    if model is not None:
        settings["model"] = model if isinstance(model, str) else "config"
    return settings_or(_PLANS[config], None, settings)


@dataclasses.dataclass(frozen=True)
class _Had(LoraOptions):
    """Of a run that goes on with the adapters that its model has."""

    had: LoraConfig | None = None

    def __post_init__(self):
        """The options were checked before."""

    def lora(self) -> LoraConfig | None:
        return self.had


def _opened(run: RunConfig, model: Any) -> tuple[RunConfig, ModelConfig]:
    """The run, with the adapters that its model has, and the config of the model; of
    adapters only the headers are read."""
    folder = located(model).expanduser() if isinstance(model, str) else None
    if folder is None or not is_adapter(folder):
        whole = f"{run.model} is a whole model, no adapter: leave out --base"
        check(run.base is None, whole)
        return run, _model_config(model)
    told = read_adapter_config(folder)
    revision = told.raw.get("revision") if run.base is None else None
    model_config = _model_config(told.base(run.base), revision)
    if told.is_scalar:
        model_config = dataclasses.replace(model_config, num_labels=1)
    had = read_lora_config(folder, Model(model_config))
    adapters_of(run, had)  # raises where the run would
    had = _Had(**vars(run.lora), had=had)
    return dataclasses.replace(run, lora=had), model_config


def _model_config(
    model: str | Mapping | ModelConfig, revision: str | None = None
) -> ModelConfig:
    """ModelConfig of what `plan` takes; of a hub model only config.json is fetched."""
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, Mapping):
        return config_from_hf(dict(model))
    path = located(model).expanduser()
    if model in PUBLISHED and not path.exists():
        return config_from_hf(PUBLISHED[model])
    path = path / "config.json" if path.is_dir() else path
    if is_remote(path) and not path.is_file():
        raise FileNotFoundError(f"model {model!r}: no config.json there")
    return read_config(path if path.is_file() else _hub_file(model, revision))


def _hub_file(model: str, revision: str | None) -> Path:
    from transformers.utils import cached_file  # pyright: ignore

    try:
        file = cached_file(model, "config.json", revision=revision)
        return Path(str(file))
    except OSError as error:
        known = nearest(model, PUBLISHED) or f"; by name: {', '.join(PUBLISHED)}"
        raise FileNotFoundError(
            f"model {model!r}: no config.json there or on the hub ({error}){known}"
        ) from error


def _advice(model_config: ModelConfig, current: Plan) -> str:
    """The nearest setting whose estimate fits."""
    for words, changes, sizes in _changes(current):
        mesh = sharding.abstract_mesh(math.prod(sizes.values()), **sizes)
        try:
            config = dataclasses.replace(current.config, **changes)
            if estimate(config, model_config, mesh, current.machine).fits:
                return f"it would fit {words}"
        except ValueError:
            continue
    return "try a smaller max_length, tensor > 1, or optimizer adafactor"


def _changes(current: Plan) -> Iterator[tuple[str, dict[str, Any], dict[str, int]]]:
    """(in words, changed fields, mesh) of runs that need less, the nearest first; some
    are no valid config."""
    config, mesh = current.config, current.mesh

    def computed(**changes) -> dict[str, Any]:
        return {"compute": dataclasses.replace(config.compute, **changes)}

    lean = computed(remat=True, dtype="bfloat16")
    yield "with --remat", computed(remat=True), mesh
    most = update_rows(config) // (mesh["data"] * mesh["fsdp"])
    for parts in range(config.compute.microbatches + 1, most + 1):
        yield f"with --microbatches {parts}", computed(microbatches=parts), mesh
    yield "with --remat --dtype bfloat16", lean, mesh
    for factor in (2, 4, 8, 16, 32, 64):
        more = mesh | {"fsdp": mesh["fsdp"] * factor}
        words = f"on {math.prod(more.values())} devices with fsdp={more['fsdp']}"
        rows = {"batch_size": config.batch_size * factor}
        yield words, rows, more
        yield f"{words}, --remat and --dtype bfloat16", rows | lean, more
