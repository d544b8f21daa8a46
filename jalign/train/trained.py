"""What of a model is trained: all of it, or adapters beside a base that stays."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jalign import models
from jalign.models import Model, lora
from jalign.models.lora import LoraConfig
from jalign.pretrained import Opened
from jalign.settings import check
from jalign.train.config import RunConfig
from jalign.train.stop import whole_folder
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")
LOW_RATE = 3e-5  # below it, a rate is more likely one of full training


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


def loading(config: RunConfig, opened: Opened) -> dict[str, Any]:
    """How the parameters of a run are loaded, for `load_pretrained`: a base that stays
    as it is needs no more digits than the products take of it."""
    frozen = config.lora.lora_rank is not None or opened.lora is not None
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

    Raises: ValueError for new adapters on a model that has some.
    """
    chosen, had = config.lora.lora(), opened.lora
    check(
        chosen is None or had is None,
        f"lora_rank: {config.model} has adapters already: leave it out to go on with "
        "those, or merge them first (jalign merge) to put new ones on the result",
    )
    chosen = chosen or had
    if chosen is None:
        for name in ("lora_dropout", "quantize"):
            unread = getattr(config.lora, name)
            check(not unread, f"{name}: there are no adapters, set lora_rank")
        return Trained(params)
    _hint(config)
    key = jax.random.fold_in(jax.random.key(config.seed), 2 + number)
    trained, frozen = parts_of(model, params, chosen, None if had else key)
    sizes = (sum(x.size for x in jax.tree.leaves(t)) for t in (trained, params))
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
    if config.optim.learning_rate <= LOW_RATE:
        _log.warning(
            "learning rate %g: adapters learn best at about ten times the rate of full "
            "training (Schulman et al. 2025), for example 2e-4 for sft",
            config.optim.learning_rate,
        )
