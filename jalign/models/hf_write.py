"""Writes Hugging Face checkpoints, one weight file at a time."""

import dataclasses
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from jalign import sharding
from jalign.models import families
from jalign.models.config import ModelConfig
from jalign.models.hf_config import config_to_hf
from jalign.models.hf_files import INDEX, WEIGHTS
from jalign.models.hf_read import file_shape
from jalign.models.model import Model, Params

_log = logging.getLogger("jalign.models")
_OLD_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def save(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    *,
    max_shard_size: int = 2_000_000_000,
) -> None:
    """Writes a checkpoint that transformers (4 and 5) and `load` read.

    Collective: every process calls it, process 0 writes. Host memory: a stacked leaf
    and a weight file. An older checkpoint in the folder is replaced; its config.json
    goes first and the new one comes last, so that a torn write is no model.

    Args:
      path: the folder, created where it is missing.
      model, params: as of `load`; weights keep the dtype of the parameters.
      tokenizer: of transformers, written beside the weights; or None.
      max_shard_size: bytes; a file holds at most that much, but at least one tensor.

    Raises: ValueError where params do not fit the model, or are not finite; nothing
      is touched then.
    """
    folder, write = Path(path), sharding.is_main_process()
    shapes = jax.tree.map(lambda x: x.shape, params)
    if shapes != jax.tree.map(lambda x: x.shape, model.param_shapes()):
        raise ValueError("params do not have the names and shapes of the model")
    for row in families.tensors_of(model.config):
        if not sharding.gather(_all_finite(_leaf(params, row.path))):
            raise ValueError(f"{path} is not written: {row.path} is not finite")
    settled = model.config if tokenizer is None else _settled(model.config, tokenizer)
    config, generation = config_to_hf(settled, _dtype_name(params))
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    written = _write_weights(folder, model, params, max_shard_size, write)
    if write:
        for file in folder.iterdir():
            if _OLD_FILES.fullmatch(file.name) and file.name not in written:
                file.unlink()
        if tokenizer is not None:
            _save_tokenizer(folder, tokenizer)
        _write_json(folder / "generation_config.json", generation)
        _write_json(folder / "config.json", config)
        _log.info("wrote %s: %d weight file(s)", folder, len(written))
    sharding.barrier(f"models.save {path}")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _settled(config: ModelConfig, tokenizer: Any) -> ModelConfig:
    """The config, agreeing with the tokenizer beside it on EOS and padding."""
    pad, eos = tokenizer.pad_token_id, (*config.eos_token_ids, tokenizer.eos_token_id)
    ids = tuple(dict.fromkeys(token for token in eos if token is not None))
    pad = config.pad_token_id if pad is None else pad
    return dataclasses.replace(config, eos_token_ids=ids, pad_token_id=pad)


def _save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Writes its files so that transformers 4 and 5 read the same tokenizer.

    5 calls a tokenizer without a class of its own by a name that 4 does not know, and
    lists more special tokens under a key that 4 expects to be an object.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    for key in ("backend", "is_local", "local_files_only"):
        values.pop(key, None)  # of the loading, not of the tokenizer
    _write_json(file, values)


def _dtype_name(params: Params) -> str:
    return str(params["embed"]["embedding"].dtype)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _plan(model: Model, params: Params, max_bytes: int) -> list[list[str]]:
    """Tensor names of each file, in the order in which they are written."""
    files: list[list[str]] = [[]]
    size = 0
    for row in families.tensors_of(model.config):
        leaf = _leaf(params, row.path)
        layers = leaf.shape[0] if "{}" in row.name else 1
        num_bytes = leaf.size // layers * leaf.dtype.itemsize
        for i in range(layers):
            if files[-1] and size + num_bytes > max_bytes:
                files.append([])
                size = 0
            files[-1].append(row.name.format(i))
            size += num_bytes
    return files


def _leaf(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _write_weights(
    folder: Path, model: Model, params: Params, max_bytes: int, write: bool
) -> set[str]:
    """Writes files as they fill up; returns the names of all weight files."""
    plan = _plan(model, params, max_bytes)
    names = [WEIGHTS]
    if len(plan) > 1:
        total = len(plan)
        names = [
            f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, 1 + total)
        ]
    pending: dict[str, np.ndarray] = {}
    done = 0
    for name, tensor in _tensors(model, params):
        if write:
            pending[name] = tensor
            if len(pending) == len(plan[done]):
                _write_file(folder / names[done], pending)
                pending, done = {}, done + 1
    if len(plan) == 1:
        return {WEIGHTS}
    weight_map = {t: name for name, ts in zip(names, plan, strict=True) for t in ts}
    if write:
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
    return {*names, INDEX}


def _tensors(model: Model, params: Params):
    """(name, array) of every tensor, gathering one stacked leaf at a time."""
    for row in families.tensors_of(model.config):
        leaf = sharding.gather(_leaf(params, row.path))
        left, right = row.pattern.split(" -> ")
        stacked = "{}" in row.name
        for i in range(len(leaf) if stacked else 1):
            part = leaf[i] if stacked else leaf
            x = einops.rearrange(part, f"{right} -> {left}")
            assert x.shape == file_shape(row.pattern, part.shape)
            yield row.name.format(i), np.ascontiguousarray(x)


def _write_file(file: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    temporary = file.with_name(file.name + ".tmp")
    # transformers refuses files that do not say which framework they are for.
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, file)
