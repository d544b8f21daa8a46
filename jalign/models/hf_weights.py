"""Weights to and from Hugging Face checkpoints, by the rows of families.tensors_of.

Reading is strict, and tensor by tensor to its shards: only safetensors files are ever
opened (a pickle can run code), and only after their headers have shown that they hold
exactly the tensors of the model. Writing goes one tensor at a time, and each process
writes its share of the files.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import families, hf_files, hf_headers, tensors
from jalign.models.config import ModelConfig
from jalign.models.hf_config import config_to_hf, read_config, settled
from jalign.models.hf_files import WeightFiles, report as _report
from jalign.models.hf_reading import Flat, read_params
from jalign.models.hf_writing import Written, checkpoint, write_shards
from jalign.models.model import Model, Params
from jalign.models.quantize import check_method
from jalign.models.quantized import is_quantized
from jalign.paths import located
from jalign.sharding import agreement, blocks

_log = logging.getLogger("jalign.models")


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    attention: str = "auto",
    quantize: str | None = None,
) -> tuple[Model, Params]:
    """Loads a Hugging Face checkpoint of a family in families.FAMILIES.

    Collective where the mesh is of several processes: each reads its share of the rows
    of every tensor, and the devices exchange them; host memory, beside the parameters,
    is its share of a layer's tensor. One process reads the slices of a stacked leaf
    (one kind of tensor over all layers) after another. Kernels that are quantized are
    read whole by each process, and become codes layer by layer: memory then holds one
    layer's kernel, and codes.

    Args:
      path: a folder or its URL, or a hub id such as "org/name", which is downloaded.
      mesh: of sharding.make_mesh; None puts everything on the default device.
      dtype: of activations and matmul inputs, see Model.
      param_dtype: of kernels and embeddings; float32 where they are trained. Norms,
        biases and scalar heads, which compute in float32, are float32 always.
      remat, attention: see Model.
      quantize: "nf4" (with double quantization) or "int8": the layers' kernels become
        codes, see models.quantize; embeddings, norms, biases and heads stay. None:
        kernels are as the file has them; bitsandbytes' nf4 is taken over as it is.

    Returns: the model and its parameters. A ...ForSequenceClassification with one
      label gives a model with a scalar head (num_labels=1).
    Raises: FileNotFoundError where there is no checkpoint. ValueError that lists all
      missing, unexpected, duplicate, misshapen and non-finite tensors, and wrong types;
      and for quantized checkpoints of other kinds. What one process meets, all raise.
    """
    if quantize is not None:
        check_method(quantize)
    shared = mesh is not None and mesh.is_multi_process
    alike = (
        agreement.together(f"loading {path}") if shared else contextlib.nullcontext()
    )
    with contextlib.ExitStack() as stack:
        with alike:
            folder = hf_files.model_folder(path)
            config = read_config(folder)
            model = Model(config, mesh, dtype, remat, attention)  # pyright: ignore[reportArgumentType]
            shapes: Flat = flatten_dict(model.param_shapes(), sep="/")
            files = stack.enter_context(WeightFiles(folder))
            hf_headers.name_as_the_family(files, config)
            problems = hf_headers.problems_of(files, config, shapes)
            if problems:
                raise ValueError(_report(folder, problems))
        how = jnp.dtype(param_dtype), quantize
        params = read_params(files, model, shapes, *how, problems)
    found = agreement.gather_objects(problems or None) if shared else [problems]
    if any(found):
        # Each line once: several devices may have had rows of a bad tensor.
        lines = dict.fromkeys(line for lines in found for line in lines or ())
        raise ValueError(_report(folder, [*lines]))
    count = sum(math.prod(x.shape) for x in shapes.values())
    _log.info("loaded %s: %s, %.1fM parameters", folder, config.family, count / 1e6)
    return model, unflatten_dict(params, sep="/")


def save(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    *,
    max_shard_size: int = 2_000_000_000,
) -> None:
    """Writes a checkpoint that transformers (4 and 5) and `load` read.

    Collective: every process calls it, and writes its share of the files. Host memory,
    beside the parameters, is a tensor of one layer; device memory, where processes
    share the mesh, a piece of it (sharding.blocks). An older checkpoint in the folder
    is replaced, see hf_writing.checkpoint.

    Args:
      path: the folder or its URL, created where it is missing; all processes see it.
      model, params: as of `load`; weights keep the dtype of the parameters.
      tokenizer: of transformers, written beside the weights; or None.
      max_shard_size: bytes; a file holds at most that much, but at least one tensor.

    Raises: ValueError where params do not fit the model, are quantized, or are not
      finite; nothing is touched then. OSError on every process where one of them could
      not write.
    """
    if is_quantized(params):
        raise ValueError(
            f"{path} is not written: its kernels are quantized, and a checkpoint of "
            "them would have lost what they had; save the adapters, and merge them "
            "into the full-precision model (jalign merge)"
        )
    folder, share = located(path), sharding.process_slice()
    shapes = jax.tree.map(lambda x: x.shape, params)
    if shapes != jax.tree.map(lambda x: x.shape, model.param_shapes()):
        raise ValueError("params do not have the names and shapes of the model")
    flat: Flat = flatten_dict(params, sep="/")
    for row in families.tensors_of(model.config):
        if not sharding.gather(_all_finite(flat[row.path])):
            raise ValueError(f"{path} is not written: {row.path} is not finite")
    dtype = str(flat["embed/embedding"].dtype)
    config, generation = config_to_hf(settled(model.config, tokenizer), dtype)
    plan, make = _plan(model.config, flat, max_shard_size), _maker(model.config, flat)
    with checkpoint(folder, config, generation, tokenizer, share) as written:
        join = functools.partial(make, own=False)
        written |= write_shards(folder, plan, make, join=join, share=share)
    if share[0] == 0:
        _log.info("wrote %s: %d weight file(s)", folder, len(plan))


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _plan(config: ModelConfig, params: Flat, max_bytes: int) -> list[list[str]]:
    """Tensor names of each file, in the order in which they are written."""
    files: list[list[str]] = [[]]
    size = 0
    for row in _rows(config, params):
        leaf = params[row.path]
        names = row.names(leaf.shape)
        num_bytes = leaf.size // len(names) * leaf.dtype.itemsize
        for name in names:
            if files[-1] and size + num_bytes > max_bytes:
                files.append([])
                size = 0
            files[-1].append(name)
            size += num_bytes
    return files


def _rows(config: ModelConfig, params: Flat) -> list[tensors.Tensor]:
    """In the order of writing: larger items first, as TensorWriter wants them."""
    rows = families.tensors_of(config)
    return sorted(rows, key=lambda row: -params[row.path].dtype.itemsize)


def _maker(config: ModelConfig, params: Flat) -> Callable[..., Written]:
    """Name of a tensor -> what is written for it; nothing where it is not one's own.

    Collective: the devices of all processes have parts of it.
    """
    where = {
        name: (row, index)
        for row in families.tensors_of(config)
        for name, index in zip(
            row.names(params[row.path].shape),
            np.ndindex(*params[row.path].shape[: row.stacks]),
            strict=True,
        )
    }

    def make(name: str, *, own: bool = True) -> Written:
        row, index = where[name]
        leaf = params[row.path]
        if not own:
            blocks.fetch(leaf, index, None)
            return Written({})
        inner = leaf.shape[row.stacks :]
        x = np.empty(tensors.file_shape(row.pattern, inner), leaf.dtype)
        sizes = dict(zip(row.pattern.split(" -> ")[1].split(), inner, strict=True))
        as_parameter = einops.rearrange(x, row.pattern, **sizes)
        assert np.may_share_memory(x, as_parameter)  # a view, through which x is filled
        blocks.fetch(leaf, index, as_parameter)
        return Written({name: x})

    return make
