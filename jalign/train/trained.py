"""What of a model is trained: all of it, or adapters beside a base that stays."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jalign import models
from jalign.models import Model, lora
from jalign.models.lora import LoraConfig
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
    """

    params: PyTree
    frozen: PyTree | None = None
    lora: LoraConfig | None = None

    def whole(self, params: PyTree) -> PyTree:
        """The model's parameters, from those that are trained."""
        return params if self.frozen is None else lora.join(self.frozen, params)


def part(
    config: RunConfig,
    model: Model,
    params: PyTree,
    *,
    had: LoraConfig | None = None,
    number: int = 0,
) -> Trained:
    """What a run trains of a model.

    Args:
      config: the run's.
      model, params: as it starts.
      had: of the adapters that are among the parameters already; None without.
      number: of the model, where a run trains several.

    Raises: ValueError for new adapters on a model that has some.
    """
    chosen = config.lora.lora()
    check(
        chosen is None or had is None,
        f"lora_rank: {config.model} has adapters already: leave it out to go on with "
        "those, or merge them first (jalign merge) to put new ones on the result",
    )
    chosen = chosen or had
    if chosen is None:
        unread = config.lora.lora_dropout
        check(not unread, "lora_dropout: there are no adapters, set lora_rank")
        return Trained(params)
    _hint(config)
    if had is not None:
        base, adapters = lora.split(params)
        full = {lora.FULL[name] for name in had.train_full}
        full |= {"score"} if model.has_scalar_head else set()
        adapters |= {name: base[name] for name in full}
    else:
        key = jax.random.fold_in(jax.random.key(config.seed), 2 + number)
        base, adapters = params, lora.init(model, params, chosen, key)
    trained, scales = lora.trainable(adapters)
    kept = {name: value for name, value in base.items() if name not in trained}
    frozen = lora.join(kept | {"layers": base["layers"]}, scales)
    count, total = (
        sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, params)
    )
    _log.info("training %.2fM parameters beside %.1fM", count / 1e6, total / 1e6)
    return Trained(trained, frozen, chosen)


def save(
    out: Path,
    model: Model,
    parted: Trained,
    params: PyTree,
    tokenizer: Any,
    config: RunConfig,
    *,
    name: str = "model",
) -> Path:
    """Writes OUT/model in HF format, or OUT/adapter in PEFT's; returns which.

    Args:
      out: the run's directory.
      model, parted: what is trained.
      params: as trained.
      tokenizer: written beside them.
      config: the run's, for what the adapters stand on.
      name: of the folder; adapters in place of "model" are in "adapter".
    """
    if parted.lora is None or parted.frozen is None:
        with whole_folder(out / name) as folder:
            models.save(folder, model, params, tokenizer)
        return out / name
    name = "adapter" if name == "model" else name
    adapters = lora.join(lora.split(parted.frozen)[1], params)
    with whole_folder(out / name) as folder:
        models.save_adapter(
            folder,
            model,
            adapters,
            parted.lora,
            base=config.model,
            dropout=config.lora.lora_dropout,
            tokenizer=tokenizer,
        )
    return out / name


def _hint(config: RunConfig) -> None:
    if config.optim.learning_rate <= LOW_RATE:
        _log.warning(
            "learning rate %g: adapters learn best at about ten times the rate of full "
            "training (Schulman et al. 2025), for example 2e-4 for sft",
            config.optim.learning_rate,
        )
