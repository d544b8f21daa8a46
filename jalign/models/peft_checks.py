"""Whether an adapter's file holds what its config says and its base takes.

By the header of the file; no weights are read, but those of a tied embedding.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from jalign.models import hf_files, lora
from jalign.models.hf_files import ADAPTER_CONFIG, WeightFiles
from jalign.models.lora import LoraConfig
from jalign.models.model import Model
from jalign.models.peft_config import MERGE, AdapterConfig
from jalign.models.peft_names import (
    PREFIX,
    axis_sizes,
    file_shape,
    full_copies,
    leaf_shapes,
    low_rank,
    needs_two_copies,
    tied_names,
)
from jalign.models.tensors import Tensor

_log = logging.getLogger("jalign.models")
_DTYPES = ("F32", "F16", "BF16")
_SCORE = PREFIX + "score.weight"
# A full copy stands under its plain name, or as PEFT's wrapper has it.
_WRAPPER = re.compile(r"\.modules_to_save(\.default)?(?=\.)")
_REPLACED = ".original_module."  # the base's own, beside one of those
# Reward heads in another tool's format.
_OTHER_HEADS = ("value_head.safetensors", "value_head.bin")
# What a file may hold that is not computed here.
_UNSUPPORTED = {
    r"\.lora_magnitude_vector": "DoRA's magnitudes are",
    r"\.lora_embedding_[AB]": "an adapter of the embedding is",
    r"\.token_adapter\.": "rows of the embedding that are trained alone are",
    r"\.bias$": "a trained bias is",
    r"\.base_layer\.|\.lora_[AB]\.": "an adapter of no layer's linear map is",
    r"\.layers\.\d+\.": "a full copy of a part of a layer is",
}
Layers = dict[str, list[int]]  # module of a layer -> the layers in which it is adapted


def checked(
    told: AdapterConfig, files: WeightFiles, model: Model
) -> tuple[LoraConfig, dict[str, str]]:
    """What the adapters are, and where their tensors are.

    Args:
      told: of the folder.
      files: its weights.
      model: the base, see `load_adapter`.

    Returns: a LoraConfig; and plain name of a tensor -> its name in the file.
    Raises: ValueError that lists what is wrong.
    """
    names, problems = _plain_names(files)
    problems += _other_heads(files) + _tied_problems(told, files, names, model)
    layers = _adapted(told, names, model)
    if not any(layers.values()) and not problems:
        problems.append(f"there is no low-rank pair of a linear layer; {MERGE}")
    if problems:
        raise ValueError(hf_files.report(files.folder, problems))
    config = _lora_config(told, names, model, layers)
    problems += _tensor_problems(told, files, names, model, config)
    if problems:
        raise ValueError(hf_files.report(files.folder, problems))
    return config, names


def _plain_names(files: WeightFiles) -> tuple[dict[str, str], list[str]]:
    names: dict[str, str] = {}
    problems = list(files.problems)
    for name in files:
        plain = _WRAPPER.sub("", name)
        if _REPLACED in name:
            continue
        if plain in names:
            problems.append(f"{name} and {names[plain]} are the same tensor")
        names[plain] = name
    return names, problems


def _other_heads(files: WeightFiles) -> list[str]:
    return [
        f"{name} is a reward head in another tool's format, which is not read: save it "
        f"as {_SCORE} in {files.name}; or remove it, to use the language model alone"
        for name in _OTHER_HEADS
        if (files.folder / name).is_file()
    ]


def _tied_problems(
    told: AdapterConfig, files: WeightFiles, names: dict[str, str], model: Model
) -> list[str]:
    """Takes the head's copy out of `names`, where it is one."""
    if not needs_two_copies(model):
        return []
    head_name, embed_name = tied_names(model)
    head = names.pop(head_name, None)
    if head is None:
        module = embed_name.removeprefix(PREFIX).removesuffix(".weight")
        if told.raw.get("ensure_weight_tying") or not told.saves(module):
            return []
        why = "is trained without the head that the base ties to it"
        return [f"{embed_name} {why}, so PEFT has two matrices; {MERGE}"]
    embed = names.get(embed_name)
    same = embed is not None and files.shape(embed) == files.shape(head)
    if same and np.array_equal(files.read(embed), files.read(head)):  # pyright: ignore
        return []
    return [
        f"{head} is not {embed_name}, and the base has one matrix for both; {MERGE}"
    ]


def _adapted(told: AdapterConfig, names: Mapping[str, str], model: Model) -> Layers:
    """By the tensors, and by target_modules where it is set."""
    listed = "target_modules" in told.raw

    def is_adapted(row: Tensor, layer: int) -> bool:
        there = any(low.name.format(layer) in names for low in low_rank(row))
        return there or (listed and told.targets(row.module.format(layer)))

    return {
        module: [i for i in range(model.config.num_layers) if is_adapted(row, i)]
        for module, row in lora.kernels(model).items()
    }


def _lora_config(
    told: AdapterConfig, names: Mapping[str, str], model: Model, layers: Layers
) -> LoraConfig:
    kernels, count = lora.kernels(model), model.config.num_layers
    targets = tuple(m.rpartition(".")[2] for m, found in layers.items() if found)
    left_out = tuple(
        (kernels[module].module.format(i), 0)
        for module, found in layers.items()
        for i in range(count)
        if found and i not in found
    )
    full = []
    for name, row in full_copies(model).items():
        saved = told.saves(row.module)
        if row.name in names and not saved and name != "score":
            _log.warning("%s: its own %s replaces the base's", told.file.parent, name)
        if row.name in names or saved:
            full.append(name)
    if model.has_scalar_head:  # is always trained in full
        full = [name for name in full if name != "score"]
    return replace(
        told.lora,
        targets=targets if len(targets) < len(kernels) else ("all",),
        rank_pattern=left_out + told.lora.rank_pattern,
        train_full=tuple(full),
    )


def _tensor_problems(
    told: AdapterConfig,
    files: WeightFiles,
    names: Mapping[str, str],
    model: Model,
    config: LoraConfig,
) -> list[str]:
    want = dict(_expected(model, config))
    problems = [_missing(name) for name in want if name not in names]
    for plain, name in names.items():
        got, dtype = files.shape(name), files.dtype(name)
        module = plain.removeprefix(PREFIX).partition(".lora_")[0]
        if plain not in want:
            problems.append(_unexpected(name, got, model))
        elif got != want[plain]:
            problems.append(_misshapen(name, got, want[plain]))
        elif dtype not in _DTYPES:
            problems.append(f"{name} has dtype {dtype}, not one of {_DTYPES}")
        elif ".lora_" in plain and not _listed(told, module):
            problems.append(f"{name}: {ADAPTER_CONFIG} does not target its module")
    return problems


def _listed(told: AdapterConfig, module: str) -> bool:
    return "target_modules" not in told.raw or told.targets(module)


def _expected(
    model: Model, config: LoraConfig
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape in the file) of every tensor."""
    shapes = leaf_shapes(model, config)
    for row in lora.targeted(model, config).values():
        for low in low_rank(row):
            shape = shapes[low.path].shape
            for layer in range(shape[0]):
                rank, _ = config.rank_and_alpha(row.module.format(layer))
                sizes = axis_sizes(low, shape) | {"rank": rank}
                if rank:
                    yield low.name.format(layer), file_shape(low, sizes)
    for row in full_copies(model).values():
        if row.path in shapes:
            sizes = axis_sizes(row, shapes[row.path].shape)
            yield row.name, file_shape(row, sizes)


def _missing(name: str) -> str:
    if name != _SCORE:
        return f"missing tensor {name}"
    return f"missing tensor {name}: train reward models with modules_to_save score"


def _misshapen(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> str:
    axis = 0 if ".lora_A." in name else 1
    ranks = got[axis : axis + 1], want[axis : axis + 1]
    if ".lora_" in name and len(got) == 2 and ranks[0] != ranks[1]:
        said = f"{ranks[1][0]} by r and rank_pattern of {ADAPTER_CONFIG}"
        return f"{name} has rank {ranks[0][0]}, and {said}"
    if ".lora_" not in name and got[1:] == want[1:] and want[0] > 1:
        resized = "give the base that has its tokens"
        return f"{name} is of {got[0]} tokens, its base of {want[0]}: {resized}"
    return f"{name} has shape {got}, for this base {want}: is it of another one?"


def _unexpected(name: str, shape: tuple[int, ...], model: Model) -> str:
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= model.config.num_layers:
        return f"{name}: the base has {model.config.num_layers} layers"
    for pattern, what in _UNSUPPORTED.items():
        if re.search(pattern, name):
            return f"{name}: {what} not supported; {MERGE}"
    if name == _SCORE:
        return f"{name}: the model has no scalar head, see Model.with_scalar_head"
    return f"unexpected tensor {name} {shape}; {MERGE}"
