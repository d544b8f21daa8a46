"""Checkpoints made of checkpoints, a tensor at a time.

In memory are one tensor of each input, and what is computed of them in float32; the
result is rounded once, to the dtype of the first input's tensor or to a given one.
Files are cut as the first input's are.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jalign.models import families, lora
from jalign.models.hf_checkpoints import (
    Out,
    check_alike,
    opened,
    read,
    rows_of,
    write,
)
from jalign.models.hf_files import WeightFiles
from jalign.models.hf_writing import DTYPES, Written
from jalign.models.model import Model
from jalign.models.peft_files import load_adapter
from jalign.models.peft_names import axis_sizes
from jalign.models.tensors import Tensor


def merge_adapter(base: Path, adapter: Path, out: Out, dtype: str | None = None) -> int:
    """Writes a base with an adapter in it, W + s A B; as `lora.merge` in memory.

    Heads and embeddings that were trained in full take the place of the base's.

    Args:
      base: folder of a model.
      adapter: folder of an adapter in PEFT's format.
      out: its config is that of the adapted model: a scalar head where the adapter has
        one.
      dtype: of the weights, a NumPy name; None keeps each tensor's own.

    Returns: the number of tensors.
    Raises: ValueError, FileNotFoundError: as `load` and `load_adapter`; ValueError too
      for a result that is not finite.
    """
    model = Model(out.config)
    adapters: dict[str, Any] = flatten_dict(load_adapter(adapter, model)[0], sep="/")
    shapes: dict[str, Any] = flatten_dict(model.param_shapes(), sep="/")
    rows = rows_of(out.config)
    with opened([base]) as (files,):

        def make(name: str) -> jax.Array | np.ndarray:
            row, layer = rows[name]
            if row.path in adapters:
                return _in_file(row, adapters[row.path])
            x, factors = read(files, name), _factors(adapters, row, layer)
            sizes = axis_sizes(row, shapes[row.path].shape)
            return _adapted(x, row, sizes, factors) if factors else x

        return _write(out, files, make, dtype)


def _factors(adapters: dict[str, Any], row: Tensor, layer: int) -> dict[str, Any]:
    """A, B and s of a layer's kernel, each with one layer; {} where it has none."""
    parent = row.path.removesuffix(row.kind)
    names = (lora.A, lora.B, lora.SCALE)
    if row.kind != "kernel" or parent + lora.A not in adapters:
        return {}
    return {name: adapters[parent + name][layer : layer + 1] for name in names}


def _adapted(x: np.ndarray, row: Tensor, sizes: dict[str, int], factors) -> jax.Array:
    """A file's tensor of a kernel with its adapter, float32."""
    regrouped = einops.rearrange(x, row.pattern, **sizes)
    kernel = jnp.asarray(regrouped[None], jnp.float32)
    merged = lora.merge({"layer": {"kernel": kernel, **factors}})["layer"]["kernel"]
    return _in_file(row, merged[0])


def _in_file(row: Tensor, x: jax.Array) -> jax.Array:
    """A parameter of a layer, with the axes that the file has."""
    left, right = row.pattern.split(" -> ")
    return einops.rearrange(x, f"{right} -> {left}")


def average(
    models: Sequence[Path],
    combine: Callable[..., jax.Array],
    out: Out,
    *,
    base: Path | None = None,
    dtype: str | None = None,
) -> int:
    """Writes what `combine` makes of each tensor of several models.

    Args:
      models: their folders; of one computation, see `check_alike`.
      combine: (name, tensors of the models, that of the base or None) -> float32, all
        of one shape; see averaging.
      out: config and tokenizer of the first model, as a rule.
      base: folder of the model that they came from, where `combine` asks for it.
      dtype: of the weights, a NumPy name; None keeps the dtypes of the first model.

    Returns: the number of tensors.
    Raises: ValueError, FileNotFoundError: as `load`, and as `check_alike`; ValueError
      too for a result that is not finite.
    """
    folders = [*models, *([base] if base else [])]
    check_alike(folders)
    with opened(folders) as files:

        def make(name: str) -> jax.Array:
            tensors = [read(each, name) for each in files]
            start = tensors.pop() if base else None
            return combine(name, tensors, start)

        return _write(out, files[0], make, dtype)


def _write(
    out: Out, like: WeightFiles, make: Callable[[str], Any], dtype: str | None
) -> int:
    """Writes make(name) of each tensor, rounded; returns their number."""
    # For a head that the first has not.
    own = like.dtype(families.tied_names(out.config)[1])
    dtypes = {
        name: np.dtype(dtype or DTYPES[like.dtype(name) if name in like else own])
        for name in rows_of(out.config)
    }

    def rounded(name: str) -> Written:
        with np.errstate(over="ignore"):
            x = np.asarray(make(name)).astype(dtypes[name], copy=False)
        if not np.isfinite(x).all():
            raise ValueError(
                f"{out.folder}: {name} is not finite in {dtypes[name]}; try another "
                "--dtype"
            )
        return Written({name: x})

    write(out, like, dtypes, rounded)
    return len(dtypes)
