"""A model with its tokenizer: loaded by this one function in every command."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import data, models
from jalign.types import PyTree


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


def load_pretrained(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    head: Literal["language", "scalar"] | None = None,
) -> Pretrained:
    """Loads a model with its tokenizer, and settles their special tokens.

    `model.config` then has, and `models.save` writes, one set of them: bos and pad of
    the tokenizer; and as end of text what config.json, generation_config.json, the
    tokenizer and the chat template's end of a turn name.

    Args:
      path: a folder, or a hub id.
      mesh, dtype, remat: as in `models.load`.
      head: "language" or "scalar" (a reward model), where only that will do.

    Raises: FileNotFoundError, ValueError: as `models.load` and `data.load_tokenizer`;
      ValueError too where model and tokenizer do not belong together, for the other
      kind of head, and for a folder that holds an adapter only.
    """
    folder = models.model_folder(path)
    config = models.read_config(folder)
    if head == "language" and config.num_labels:
        raise ValueError(f"{path} is a reward model; give a causal language model")
    if head == "scalar" and not config.num_labels:
        raise ValueError(f"{path} is a language model; give a reward model")
    tokenizer = data.load_tokenizer(folder)
    data.check_vocab(tokenizer, config.vocab_size, where=str(path))
    model, params = models.load(folder, mesh=mesh, dtype=dtype, remat=remat)
    config = settle(model.config, tokenizer)
    return Pretrained(model.replace(config=config), params, tokenizer)


def settle(config: models.ModelConfig, tokenizer: Any) -> models.ModelConfig:
    """The config with the special tokens that its tokenizer adds, see above."""
    bos = tokenizer.bos_token_id
    return dataclasses.replace(
        config,
        bos_token_id=config.bos_token_id if bos is None else bos,
        eos_token_ids=tuple(data.stop_tokens(tokenizer, config.eos_token_ids)),
        pad_token_id=tokenizer.pad_token_id,
    )


def check_same_vocab(first: Pretrained, second: Pretrained, names: str) -> None:
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
