"""What the headers of a checkpoint must say: each tensor of the model, and no other.

A kernel may be stored as bitsandbytes has it: 4-bit codes at the tensor's own name, and
tables at names that begin with it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jalign.models import families, tensors
from jalign.models.config import ModelConfig
from jalign.models.hf_files import WeightFiles
from jalign.models.quantize import BLOCK, GROUP, NF4

ADVICE = 'load the full-precision model, with quantize="nf4" to make it small'
STATE = "quant_state.bitsandbytes__nf4"
"""bitsandbytes' name for a kernel's description, a JSON text as bytes."""


class Header(NamedTuple):
    """A tensor's shape and its allowed dtypes; a shape of None is any."""

    shape: tuple[int, ...] | None
    dtypes: tuple[str, ...] = ("F32", "F16", "BF16")


def is_stored_in_4_bits(files: WeightFiles, names: list[str]) -> bool:
    """Whether kernels of these names are bitsandbytes'."""
    return any(f"{name}.{STATE}" in files for name in names)


def name_as_the_family(files: WeightFiles, config: ModelConfig) -> None:
    """Renames tensors that an older file, or a larger model's, has by other names."""
    family = families.FAMILIES[config.family]
    heads = tuple(family.modules[head] for head in ("unembed", "score"))
    for old, new in family.renamed:
        files.rename(lambda name, old=old, new=new: re.sub(old, new, name))
    if not any(name.startswith(family.root) for name in files):
        files.rename(lambda n: n if n.startswith(heads) else family.root + n)


def problems_of(
    files: WeightFiles, config: ModelConfig, shapes: Mapping[str, Any]
) -> list[str]:
    """Compares the files' headers with the model; reads no weights.

    Args:
      files: the checkpoint.
      config: of the model.
      shapes: path -> the parameter's shape, as a ShapeDtypeStruct.
    """
    want: dict[str, Header] = {}
    problems = list(files.problems)
    for row in families.tensors_of(config):
        shape = shapes[row.path].shape
        expected = tensors.file_shape(row.pattern, shape[row.stacks :])
        names = row.names(shape)
        if tensors.is_linear(row.path) and is_stored_in_4_bits(files, names):
            for name in names:
                want |= _in_4_bits(files, name, math.prod(expected))
                if name in files and files.dtype(name) != "U8":
                    problems.append(
                        f"{name} is not in 4 bits, but other layers' are; {ADVICE}"
                    )
        else:
            want |= dict.fromkeys(names, Header(expected))
    problems += [f"missing tensor {name}" for name in want if name not in files]
    return problems + list(_misfits(files, config, want))


def _misfits(
    files: WeightFiles, config: ModelConfig, want: dict[str, Header]
) -> Iterator[str]:
    for name in files:
        got, dtype = files.shape(name), files.dtype(name)
        if name in want:
            shape, dtypes = want[name]
            if shape not in (got, None):
                yield f"{name} has shape {got}, the config says {shape}"
            elif dtype not in dtypes:
                yield f"{name} has dtype {dtype}, not one of {dtypes}"
        elif not _allowed(files, config, name):
            yield f"unexpected tensor {name} {got}"


def _in_4_bits(files: WeightFiles, name: str, size: int) -> dict[str, Header]:
    """The tensors of a kernel of so many weights."""
    nested = f"{name}.nested_absmax" in files
    blocks = -(-size // BLOCK)
    headers = {
        name: Header((-(-size // 2), 1), ("U8",)),
        f"{name}.absmax": Header((blocks,), ("U8" if nested else "F32",)),
        f"{name}.quant_map": Header((NF4.size,), ("F32",)),
        f"{name}.{STATE}": Header(None, ("U8",)),
    }
    if nested:
        groups = -(-blocks // GROUP)
        headers[f"{name}.nested_absmax"] = Header((groups,), ("F32",))
        headers[f"{name}.nested_quant_map"] = Header((256,), ("F32",))
    return headers


def _allowed(files: WeightFiles, config: ModelConfig, name: str) -> bool:
    """Whether a tensor that the model lacks is one of the known harmless ones."""
    ignored = families.FAMILIES[config.family].ignored
    if any(re.fullmatch(pattern, name) for pattern in ignored):
        return True
    copy, original = families.tied_names(config)
    if name != copy or not config.tie_embeddings or config.num_labels:
        return False
    if original not in files or files.shape(name) != files.shape(original):
        return False
    return np.array_equal(files.read(name), files.read(original))


def check_quantization(raw: dict[str, Any]) -> None:
    """Raises ValueError for quantized weights, but bitsandbytes' nf4, which is read."""
    given = raw.get("quantization_config") or raw.get("compression_config")
    if given is None:
        return
    what = str(given)[:80]  # a stranger's value may be long
    if isinstance(given, dict):
        what = given.get("quant_method") or "of no quant_method"
        if what == "bitsandbytes" and given.get("load_in_4bit") is True:
            kind = given.get("bnb_4bit_quant_type") or "fp4"
            storage = given.get("bnb_4bit_quant_storage") or "uint8"
            if (kind, storage) == ("nf4", "uint8"):
                return
            what = f"bitsandbytes {kind} stored as {storage}"
        elif what == "bitsandbytes":
            what = "bitsandbytes int8 (LLM.int8)"
    raise ValueError(
        f"quantization_config: {what} is not read, only bitsandbytes nf4 stored as "
        'uint8; give the full-precision model, and quantize it ("nf4" or "int8") '
        "while it is loaded"
    )
