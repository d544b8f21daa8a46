"""A model with its tokenizer: opened and loaded by these functions in every command.

Opening reads the small files and says whatever is wrong with them; loading reads the
weights. What lies between (rows, rewards) is checked before anything large is read.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import data, models
from jalign.models.hf_files import is_adapter
from jalign.models.lora import LoraConfig
from jalign.models.peft_config import AdapterConfig, read_adapter_config
from jalign.models.peft_files import read_lora_config
from jalign.types import PyTree

_log = logging.getLogger("jalign")
Head = Literal["language", "scalar"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

__all__ = [
    "Opened",
    "Pretrained",
    "check_same_vocab",
    "load_pretrained",
    "open_pretrained",
    "settle",
]


class Opened(NamedTuple):
    """A checkpoint whose weights are still to be read.

    Attributes:
      folder: where its files are; of an adapter, its base's.
      config: with the special tokens that were settled.
      tokenizer: of transformers.
      adapter: the folder of the adapters on it; None without.
      lora: what they are.
      base: name of their base, a folder or hub id, as an adapter may name it.
    """

    folder: Path
    config: models.ModelConfig
    tokenizer: Any
    adapter: Path | None = None
    lora: LoraConfig | None = None
    base: str = ""


class Pretrained(NamedTuple):
    """A checkpoint, loaded.

    Attributes:
      model: its config holds the special tokens that were settled.
      params: its parameters; with adapters among them (models.lora.join), where it is
        one.
      tokenizer: of transformers.
    """

    model: models.Model
    params: PyTree
    tokenizer: Any


def open_pretrained(
    path: str | Path,
    base: str | Path | None = None,
    *,
    head: Head | None = None,
    max_length: int = 0,
) -> Opened:
    """Reads config and tokenizer, and settles their special tokens.

    `config` then has, and `models.save` writes, one set of them: bos and pad of the
    tokenizer; and as end of text what config.json, generation_config.json, the
    tokenizer and the chat template's end of a turn name.

    Args:
      path: a folder, its URL, or a hub id; of a model, or of an adapter in PEFT's
        format. Its tokenizer is that of the adapter's folder where there is one, else
        the base's; with a head "score" in it, it is a reward model on a language model.
      base: of an adapter: its base model. None takes the one that it names, by a path
        from here or from its folder, or by a hub id.
      head: "language" or "scalar" (a reward model), where only that will do.
      max_length: tokens that rows may have; a warning says where this is more than the
        model was made for.

    Raises: FileNotFoundError, ValueError: as `models.read_config`,
      `models.load_adapter` (but for its weights) and `data.load_tokenizer`; ValueError
      too where model and tokenizer do not belong together, for the other kind of head,
      for an adapter without its base, and for a base without an adapter.
    """
    folder, told, named = models.model_folder(path), None, ""
    adapter = folder if is_adapter(folder) else None
    if adapter is not None:
        told = read_adapter_config(adapter)
        folder, named = _find_base(adapter, told, base)
    elif base is not None:
        raise ValueError(f"{path} is a whole model, no adapter: leave out --base")
    config = models.read_config(folder)
    if told is not None and told.is_scalar:
        config = dataclasses.replace(config, num_labels=1)
    if head == "language" and config.num_labels:
        raise ValueError(f"{path} is a reward model; give a causal language model")
    if head == "scalar" and config.num_labels != 1:
        raise ValueError(f"{path} is no reward model (its head has no single score)")
    own = adapter and any((adapter / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = data.load_tokenizer(adapter if adapter and own else folder)
    data.check_vocab(tokenizer, config.vocab_size, where=str(path))
    if max_length > config.max_position and config.positions == "learned":
        raise ValueError(
            f"{path}: rows of up to {max_length} tokens, and the model has only "
            f"{config.max_position} positions, which are learned; give a max_length "
            "that is no longer"
        )
    if max_length > config.max_position:
        _log.warning(
            "%s: rows of up to %d tokens, and the model's context is %d: what stands "
            "beyond it, it has not learned to read",
            path,
            max_length,
            config.max_position,
        )
    lora = adapter and read_lora_config(adapter, models.Model(config))
    return Opened(folder, settle(config, tokenizer), tokenizer, adapter, lora, named)


def _find_base(
    adapter: Path, told: AdapterConfig, base: str | Path | None
) -> tuple[Path, str]:
    """(the folder of an adapter's base model, its name)."""
    named = told.base(base)
    revision = told.raw.get("revision") if base is None else None
    try:
        folder = models.model_folder(named, revision=revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter} is an adapter, and its base model is not there; give that with "
            f"--base: {error}"
        ) from error
    if is_adapter(folder):
        raise ValueError(
            f"{adapter}: its base {named} is an adapter too; merge that into its own "
            "base first (jalign merge), and give the result with --base"
        )
    return folder, named


def load_pretrained(
    source: str | Path | Opened,
    base: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    head: Head | None = None,
    param_dtype: DTypeLike = jnp.float32,
    quantize: str | None = None,
) -> Pretrained:
    """Loads a model with its tokenizer.

    Args:
      source: what `open_pretrained` gave, or what it takes.
      base: as in `open_pretrained`, where that is still to be called.
      mesh, dtype, remat, param_dtype, quantize: as in `models.load`.
      head: as in `open_pretrained`.

    Raises: as `open_pretrained` and `models.load`.
    """
    if not isinstance(source, Opened):
        source = open_pretrained(source, base, head=head)
    how: dict[str, Any] = {"mesh": mesh, "dtype": dtype, "remat": remat}
    how |= {"param_dtype": param_dtype, "quantize": quantize}
    model, params = models.load(source.folder, **how)
    model = model.replace(config=source.config)
    if source.adapter is not None:
        adapters, _ = models.load_adapter(source.adapter, model)
        params = models.lora.join(params, adapters)
        if model.config.num_labels:
            params.pop("unembed", None)
    return Pretrained(model, params, source.tokenizer)


def settle(config: models.ModelConfig, tokenizer: Any) -> models.ModelConfig:
    """The config with the special tokens that its tokenizer adds, see above."""
    bos = tokenizer.bos_token_id
    return dataclasses.replace(
        config,
        bos_token_id=config.bos_token_id if bos is None else bos,
        eos_token_ids=tuple(data.stop_tokens(tokenizer, config.eos_token_ids)),
        pad_token_id=tokenizer.pad_token_id,
    )


def check_same_vocab(
    first: Opened,
    second: Opened,
    names: str,
    why: str = "their log-probabilities are of different tokens",
) -> None:
    """Raises ValueError where two models do not mean the same by the same ids.

    Args:
      first, second: the models.
      names: how the message calls them.
      why: why they have to.
    """
    one, two = first.tokenizer.get_vocab(), second.tokenizer.get_vocab()
    if one == two:
        return
    differ = sorted(one.items() ^ two.items(), key=lambda item: item[1])
    raise ValueError(
        f"{names} have different vocabularies ({len(one)} and {len(two)} tokens; the "
        f"first that differs: {differ[0][0]!r}): {why}"
    )
