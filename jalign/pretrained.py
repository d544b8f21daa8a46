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
from jalign.types import PyTree

_log = logging.getLogger("jalign")
Head = Literal["language", "scalar"]

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
      folder: where its files are.
      config: with the special tokens that were settled.
      tokenizer: of transformers.
      adapter: the folder of the adapters on it; None without.
      lora: what they are.
    """

    folder: Path
    config: models.ModelConfig
    tokenizer: Any
    adapter: Path | None = None
    lora: models.lora.LoraConfig | None = None


class Pretrained(NamedTuple):
    """A checkpoint, loaded.

    Attributes:
      model: its config holds the special tokens that were settled.
      params: its parameters.
      tokenizer: of transformers.
    """

    model: models.Model
    params: PyTree
    tokenizer: Any


def open_pretrained(
    path: str | Path, *, head: Head | None = None, max_length: int = 0
) -> Opened:
    """Reads config and tokenizer, and settles their special tokens.

    `config` then has, and `models.save` writes, one set of them: bos and pad of the
    tokenizer; and as end of text what config.json, generation_config.json, the
    tokenizer and the chat template's end of a turn name.

    Args:
      path: a folder, or a hub id.
      head: "language" or "scalar" (a reward model), where only that will do.
      max_length: tokens that rows may have; a warning says where this is more than the
        model was made for.

    Raises: FileNotFoundError, ValueError: as `models.read_config` and
      `data.load_tokenizer`; ValueError too where model and tokenizer do not belong
      together, for the other kind of head, and for a folder that holds an adapter only.
    """
    folder = models.model_folder(path)
    config = models.read_config(folder)
    if head == "language" and config.num_labels:
        raise ValueError(f"{path} is a reward model; give a causal language model")
    if head == "scalar" and config.num_labels != 1:
        raise ValueError(f"{path} is no reward model (its head has no single score)")
    tokenizer = data.load_tokenizer(folder)
    data.check_vocab(tokenizer, config.vocab_size, where=str(path))
    if max_length > config.max_position:
        _log.warning(
            "%s: rows of up to %d tokens, and the model's context is %d: what stands "
            "beyond it, it has not learned to read",
            path,
            max_length,
            config.max_position,
        )
    return Opened(folder, settle(config, tokenizer), tokenizer)


def load_pretrained(
    source: str | Path | Opened,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    head: Head | None = None,
) -> Pretrained:
    """Loads a model with its tokenizer.

    Args:
      source: what `open_pretrained` gave, or what it takes.
      mesh, dtype, remat: as in `models.load`.
      head: as in `open_pretrained`.

    Raises: as `open_pretrained` and `models.load`.
    """
    if not isinstance(source, Opened):
        source = open_pretrained(source, head=head)
    model, params = models.load(source.folder, mesh=mesh, dtype=dtype, remat=remat)
    return Pretrained(model.replace(config=source.config), params, source.tokenizer)


def settle(config: models.ModelConfig, tokenizer: Any) -> models.ModelConfig:
    """The config with the special tokens that its tokenizer adds, see above."""
    bos = tokenizer.bos_token_id
    return dataclasses.replace(
        config,
        bos_token_id=config.bos_token_id if bos is None else bos,
        eos_token_ids=tuple(data.stop_tokens(tokenizer, config.eos_token_ids)),
        pad_token_id=tokenizer.pad_token_id,
    )


def check_same_vocab(first: Opened, second: Opened, names: str) -> None:
    """Raises ValueError where two models do not mean the same by the same ids."""
    one, two = first.tokenizer.get_vocab(), second.tokenizer.get_vocab()
    if one == two:
        return
    differ = sorted(one.items() ^ two.items(), key=lambda item: item[1])
    raise ValueError(
        f"{names} have different vocabularies ({len(one)} and {len(two)} tokens; the "
        f"first that differs: {differ[0][0]!r}): their log-probabilities are of "
        "different tokens"
    )
