"""What of a model is trained, all of it or adapters beside a base that stays, and by
which step."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jalign import models, sharding
from jalign.models import Model, lora
from jalign.models.lora import LoraConfig
from jalign.pretrained import Opened
from jalign.settings import check
from jalign.train.config import RewardConfig, RunConfig, SFTConfig
from jalign.train.objectives import Objective
from jalign.train.optim import OptimConfig, make_optimizer
from jalign.train.step import TrainStep, abstract_state, make_train_step
from jalign.train.stop import whole_folder
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")
# Up to these a rate is more likely one of full training; of DPO and online runs, 1e-6.
LOW_RATE = {SFTConfig: 3e-5, RewardConfig: 3e-5}


class Trained(NamedTuple):
    """A model's parameters, parted.

    Attributes:
      params: what is trained, as it starts.
      frozen: the rest; None where all is trained.
      lora: the adapters that `params` are; None where all is trained.
      base: a folder or hub id of what they stand on.
    """

    params: PyTree
    frozen: PyTree | None = None
    lora: LoraConfig | None = None
    base: str = ""

    def whole(self, params: PyTree) -> PyTree:
        """The model's parameters, from those that are trained."""
        return params if self.frozen is None else lora.join(self.frozen, params)


def adapters_of(config: RunConfig, had: LoraConfig | None) -> LoraConfig | None:
    """The adapters that a run trains: new ones, those that its model has, or none.

    Raises: ValueError for new ones on a model that has some, and for settings of
      adapters where there are none.
    """
    chosen = config.lora.lora()
    check(
        chosen is None or had is None,
        f"lora_rank: {config.model} has adapters already: leave it out to go on with "
        "those, or merge them first (jalign merge) to put new ones on the result",
    )
    for name in ("lora_dropout", "quantize"):
        unread = chosen is None and had is None and getattr(config.lora, name)
        check(not unread, f"{name}: there are no adapters, set lora_rank")
    return chosen or had


def loading(config: RunConfig, opened: Opened) -> dict[str, Any]:
    """How the parameters of a run are loaded, for `load_pretrained`: a base that stays
    as it is needs no more digits than the products take of it."""
    frozen = adapters_of(config, opened.lora) is not None
    dtype = config.compute.dtype if frozen else "float32"
    return {"param_dtype": dtype, "quantize": config.lora.quantize}


def part(
    config: RunConfig, model: Model, params: PyTree, opened: Opened, *, number: int = 0
) -> Trained:
    """What a run trains of a model.

    Args:
      config: the run's.
      model, params: as it starts.
      opened: the checkpoint it is from; with one of adapters, these are trained on.
      number: of the model, where a run trains several.

    Raises: as `adapters_of`.
    """
    chosen = adapters_of(config, opened.lora)
    if chosen is None:
        return Trained(params)
    _hint(config)
    key = jax.random.fold_in(jax.random.key(config.seed), 2 + number)
    trained, frozen = parts_of(model, params, chosen, None if opened.lora else key)
    trees = trained, model.param_shapes()
    sizes = (sum(x.size for x in jax.tree.leaves(tree)) for tree in trees)
    _log.info(
        "training %s parameters of adapters beside %s", *map("{:,}".format, sizes)
    )
    return Trained(trained, frozen, chosen, opened.base or config.model)


def parts_of(
    model: Model, params: PyTree, config: LoraConfig, key: jax.Array | None
) -> tuple[PyTree, PyTree]:
    """(what is trained, the rest) of a model with adapters.

    Args:
      model, params: as it starts.
      config: of the adapters.
      key: for new ones; None where they are among the parameters.
    """
    if key is None:
        base, adapters = lora.split(params)
        full = {lora.FULL[name] for name in config.train_full}
        full |= {"score"} if model.has_scalar_head else set()
        adapters |= {name: base[name] for name in full}
    else:
        base, adapters = params, lora.init(model, params, config, key)
    trained, scales = lora.trainable(adapters)
    kept = {name: value for name, value in base.items() if name not in trained}
    return trained, lora.join(kept | {"layers": base["layers"]}, scales)


def save(
    out: Path,
    model: Model,
    parted: Trained,
    params: PyTree,
    tokenizer: Any,
    config: RunConfig,
) -> Path:
    """Writes OUT/model in HF format, or OUT/adapter in PEFT's; returns which.

    Args:
      out: the run's directory.
      model, parted: what is trained.
      params: as trained.
      tokenizer: written beside them.
      config: the run's.
    """
    if parted.lora is None or parted.frozen is None:
        return save_whole(out / "model", model, params, tokenizer)
    adapters = lora.join(lora.split(parted.frozen)[1], params)
    how = {"base": parted.base, "dropout": config.lora.lora_dropout}
    with whole_folder(out / "adapter") as folder:
        given = folder, model, adapters, parted.lora
        models.save_adapter(*given, tokenizer=tokenizer, **how)
    return out / "adapter"


def save_whole(target: Path, model: Model, params: PyTree, tokenizer: Any) -> Path:
    """Writes a model in HF format, adapters merged, and returns where."""
    with whole_folder(target) as folder:
        models.save(folder, model, lora.merge(params), tokenizer)
    return target


def _hint(config: RunConfig) -> None:
    rate = config.optim.learning_rate
    if rate <= LOW_RATE.get(type(config), 1e-6):
        _log.warning(
            "learning rate %g: adapters learn best at about ten times the rate of full "
            "training (Schulman et al. 2025), such as 2e-4 for sft and 1e-5 for dpo",
            rate,
        )


class Trainer(NamedTuple):
    """How a run updates one of its models.

    Attributes:
      step: of make_train_step.
      tx: its optax transformation.
    """

    step: TrainStep
    tx: optax.GradientTransformation


def make_trainer(
    objective: Objective,
    shapes: PyTree,
    optim: OptimConfig,
    *,
    mesh: Mesh | None,
    updates: int,
    microbatches: int,
    dropout: float = 0.0,
    name: str = "the training step",
) -> Trainer:
    """The optimizer and the compiled step of what has these shapes; the schedule runs
    over `updates`.

    The new state is pinned to the layout of the old one. `name` is the step's.
    """
    tx, schedule = make_optimizer(optim, updates)
    state = abstract_state(shapes, tx, mesh=mesh)
    step = make_train_step(
        objective,
        tx,
        microbatches=microbatches,
        state_shardings=mesh and sharding.state_shardings(mesh, state),
        schedule=schedule,
        name=name,
        dropout=dropout,
    )
    return Trainer(step, tx)
