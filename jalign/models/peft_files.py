"""Adapters to and from PEFT's folders, which any tool of that format reads.

A folder has adapter_config.json (peft_config.py) and adapter_model.safetensors, with A
and B of every adapted layer (peft_names.py), and full copies of what is trained in
full. y = x W + s (x A) B with s = alpha / r (Hu et al. 2021, arXiv:2106.09685).
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jalign import sharding
from jalign.models import hf_files, hf_output, lora
from jalign.models.families import FAMILIES
from jalign.models.hf_files import WeightFiles
from jalign.models.lora import LoraConfig
from jalign.models.model import Model, Params
from jalign.models.peft_checks import checked
from jalign.models.peft_config import adapter_config, read_adapter_config
from jalign.models.peft_names import (
    axis_sizes,
    full_copies,
    leaf_shapes,
    low_rank,
    needs_two_copies,
    tied_names,
)
from jalign.models.tensors import Tensor
from jalign.paths import located, make_folder
from jalign.sharding import agreement

_log = logging.getLogger("jalign.models")
Flat = Mapping[str, Any]  # path -> leaf


def save_adapter(
    path: str | Path,
    model: Model,
    adapters: Params,
    config: LoraConfig,
    *,
    base: str,
    dropout: float = 0.0,
    tokenizer: Any = None,
) -> None:
    """Writes an adapter that peft 0.21 and `load_adapter` read.

    Collective: every process calls it; process 0 has the adapters in its memory, and
    writes them. adapter_config.json goes first and comes last, so that a torn write is
    no adapter.

    Args:
      path: the folder or its URL, created where it is missing.
      model: the adapted model; a reward model or critic gives an adapter for sequence
        classification, whose base is the language model.
      adapters: as of `lora.init`; tensors keep their dtype.
      config: what the adapters were made with.
      base: folder or hub id of the base model, as the reader is to find it.
      dropout: of the training; only noted.
      tokenizer: of transformers, written beside the weights; or None.

    Raises: ValueError where adapters, config and model do not fit each other, or are
      not finite; nothing is touched then. OSError, on every process, where it cannot
      be written.
    """
    folder, write = located(path), sharding.is_main_process()
    flat: Flat = flatten_dict(adapters, sep="/")
    tensors: dict[str, np.ndarray] = {}
    try:
        _check_leaves(model, flat, config)
        for name, tensor in _tensors(model, flat, config):
            if write:
                tensors[name] = tensor
    except ValueError as error:
        raise ValueError(f"{path} is not written: {error}") from error
    with agreement.together(f"writing {path}"):
        if write:
            make_folder(folder)
            (folder / hf_files.ADAPTER_CONFIG).unlink(missing_ok=True)
            hf_output.write_tensors(folder / hf_files.ADAPTER_WEIGHTS, tensors)
            if tokenizer is not None:
                hf_output.save_tokenizer(folder, tokenizer)
            values = {"base_model_name_or_path": base, "lora_dropout": dropout}
            values |= _config_values(model, flat, config)
            file = folder / hf_files.ADAPTER_CONFIG
            hf_output.write_json(file, dict(sorted(values.items())))
            _log.info("wrote %s: an adapter of %d tensors", folder, len(tensors))


def _check_leaves(model: Model, flat: Flat, config: LoraConfig) -> None:
    """Raises ValueError where they are not what `config` makes."""
    if model.value_head:
        raise ValueError("the model has two heads: split_heads makes a model of each")
    want = {path: x.shape for path, x in leaf_shapes(model, config).items()}
    have = {path: tuple(x.shape) for path, x in flat.items()}
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            raise ValueError(
                f"{path} is {have.get(path, 'missing')}, by the LoraConfig it is "
                f"{want.get(path, 'not there')}; give the one that the adapters were "
                "made with"
            )


def _tensors(
    model: Model, flat: Flat, config: LoraConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor of the file."""
    for row in lora.targeted(model, config).values():
        for low in low_rank(row):
            if low.path in flat:
                yield from _low_rank_tensors(flat, row, low, config)
    for row in full_copies(model).values():
        if row.path in flat:
            tensor = _to_file(row, _finite(flat, row.path))
            yield row.name, tensor
            head, embed = tied_names(model)
            if row.name == embed and needs_two_copies(model):
                yield head, tensor.copy()


def _low_rank_tensors(flat: Flat, row: Tensor, low: Tensor, config: LoraConfig):
    path = row.path.removesuffix("kernel") + lora.SCALE
    scales, leaf = sharding.gather(flat[path]), _finite(flat, low.path)
    axis = 0 if low.path.endswith(lora.B) else leaf.ndim - 2
    for layer, part in enumerate(leaf):
        rank, alpha = config.rank_and_alpha(row.module.format(layer))
        scale = config.scale_of(rank, alpha)
        if scales[layer] != np.float32(scale):
            raise ValueError(
                f"{path} is {scales[layer]} in layer {layer}, by the LoraConfig {scale}"
            )
        used, rest = np.split(part, [rank], axis)
        if rest.any():
            raise ValueError(f"{low.path} is not 0 beyond rank {rank}, layer {layer}")
        if rank:
            yield low.name.format(layer), _to_file(low, used)


def _to_file(row: Tensor, part: np.ndarray) -> np.ndarray:
    left, right = row.pattern.split(" -> ")
    return np.ascontiguousarray(einops.rearrange(part, f"{right} -> {left}"))


def _finite(flat: Flat, path: str) -> np.ndarray:
    leaf = sharding.gather(flat[path])
    if not np.isfinite(leaf.astype(np.float32)).all():
        raise ValueError(f"{path} is not finite")
    return leaf


def _config_values(model: Model, flat: Flat, config: LoraConfig) -> dict[str, Any]:
    layers, targeted = range(model.config.num_layers), lora.targeted(model, config)
    linear = [
        row.module.format(i) for row in lora.kernels(model).values() for i in layers
    ]
    adapted = [
        module
        for module in (r.module.format(i) for r in targeted.values() for i in layers)
        if config.rank_and_alpha(module)[0]
    ]
    saved = [row.name for row in full_copies(model).values() if row.path in flat]
    return adapter_config(
        config,
        adapted,
        linear,
        saved=[name.split(".")[-2] for name in saved],
        tied=tied_names(model)[1] in saved and needs_two_copies(model),
        is_scalar=bool(model.config.num_labels),
        transposed=FAMILIES[model.config.family].transposed,
    )


def read_lora_config(folder: Path, model: Model) -> LoraConfig:
    """As `load_adapter`, from the headers; reads no weights."""
    told = read_adapter_config(folder)
    with WeightFiles(folder, hf_files.ADAPTER_WEIGHTS) as files:
        return checked(told, files, model)[0]


def load_adapter(path: str | Path, model: Model) -> tuple[Params, LoraConfig]:
    """Reads an adapter that peft, or a tool that writes its format, has saved.

    Every process reads the file; peak host memory is one stacked leaf.

    Args:
      path: the folder or its URL, or a hub id.
      model: the base; for an adapter with a reward head, the base `with_scalar_head`.

    Returns: the adapters for `lora.join`, float32, on the model's mesh; and what they
      are. Modules without an adapter have rank 0 in its rank_pattern; smaller ranks are
      filled up with zeros.
    Raises: FileNotFoundError; ValueError naming each file and key, or tensor, that is
      missing, unknown, misshapen, not finite, or asks for what is not computed here.
    """
    folder = hf_files.model_folder(path)
    told = read_adapter_config(folder)
    with WeightFiles(folder, hf_files.ADAPTER_WEIGHTS) as files:
        config, names = checked(told, files, model)
        shapes = leaf_shapes(model, config)
        place, problems = _placer(model, shapes), []
        flat = {
            row.path: place(row.path, _read(files, names, row, shapes, problems))
            for row in _rows(model, config)
            if row.path in shapes
        }
    if problems:
        raise ValueError(hf_files.report(folder, problems))
    for path, scales in _scales(model, config):
        if path in shapes:
            flat[path] = place(path, scales)
    _log.info("loaded %s: an adapter of rank %d", folder, config.rank)
    return unflatten_dict(flat, sep="/"), config


def _rows(model: Model, config: LoraConfig) -> Iterator[Tensor]:
    for row in lora.targeted(model, config).values():
        yield from low_rank(row)
    yield from full_copies(model).values()


def _read(
    files: WeightFiles,
    names: Mapping[str, str],
    row: Tensor,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    problems: list[str],
) -> np.ndarray:
    """A leaf, layers stacked; notes the tensors that are not finite."""
    shape = shapes[row.path].shape
    out = np.zeros(shape, np.float32)
    sizes = axis_sizes(row, shape)
    sizes.pop("rank", None)  # may be smaller in a layer
    for layer, name in enumerate(row.names(shape)):
        if name not in names:
            continue
        x = files.read(names[name]).astype(np.float32)
        if not np.isfinite(x).all():
            problems.append(f"{names[name]} is not finite")
        part = einops.rearrange(x, row.pattern, **sizes)
        whole = out[layer] if row.stacks else out
        whole[tuple(map(slice, part.shape))] = part
    return out


def _scales(model: Model, config: LoraConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(path, s [L]) of every targeted kernel."""
    for row in lora.targeted(model, config).values():
        names = row.names([model.config.num_layers])
        both = (config.rank_and_alpha(name.rpartition(".")[0]) for name in names)
        scales = np.array([config.scale_of(*pair) for pair in both], np.float32)
        yield row.path.removesuffix("kernel") + lora.SCALE, scales


def _placer(model: Model, shapes: Mapping[str, Any]):
    """(path, NumPy array) -> the array on the model's mesh."""
    if model.mesh is None:
        return lambda path, x: jnp.asarray(x)
    tree = sharding.param_shardings(model.mesh, unflatten_dict(shapes, sep="/"))
    where: dict[str, Any] = flatten_dict(tree, sep="/")

    def place(path: str, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, where[path], x.__getitem__)

    return place
