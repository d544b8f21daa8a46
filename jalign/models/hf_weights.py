"""Weights to and from Hugging Face checkpoints, by the rows of families.tensors_of.

Reading is strict, and tensor by tensor to its shards: only safetensors files are ever
opened (a pickle can run code), and only after their headers have shown that they hold
exactly the tensors of the model. Writing goes one stacked leaf at a time.
"""

import collections
import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
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
from jalign.models import families, hf_files, hf_headers, hf_quantized, tensors
from jalign.models.config import ModelConfig
from jalign.models.hf_config import config_to_hf, read_config, settled
from jalign.models.hf_files import WeightFiles, report as _report
from jalign.models.hf_writing import Written, checkpoint, write_shards
from jalign.models.model import Model, Params
from jalign.models.quantize import check_method
from jalign.models.quantized import is_quantized

_log = logging.getLogger("jalign.models")
Flat = dict[str, Any]
"""Path, such as "norm/scale" -> the parameter, its shape, or its sharding."""


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

    Every process reads only the slices that its devices hold. Peak host memory is one
    stacked leaf (one kind of tensor over all layers), not the model. Kernels that are
    quantized are read whole by each process, and become codes layer by layer: memory
    then holds one layer's kernel, and codes.

    Args:
      path: a folder, or a hub id such as "org/name", which is downloaded.
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
      and for quantized checkpoints of other kinds.
    """
    if quantize is not None:
        check_method(quantize)
    folder = hf_files.model_folder(path)
    config = read_config(folder)
    model = Model(config, mesh, dtype, remat, attention)  # pyright: ignore[reportArgumentType]
    shapes: Flat = flatten_dict(model.param_shapes(), sep="/")
    with WeightFiles(folder) as files:
        hf_headers.name_as_the_family(files, config)
        problems = hf_headers.problems_of(files, config, shapes)
        if problems:
            raise ValueError(_report(folder, problems))
        how = jnp.dtype(param_dtype), quantize
        params = _read_params(files, model, shapes, *how, problems)
    if problems:
        raise ValueError(_report(folder, problems))
    count = sum(math.prod(x.shape) for x in shapes.values())
    _log.info("loaded %s: %s, %.1fM parameters", folder, config.family, count / 1e6)
    return model, unflatten_dict(params, sep="/")


def _read_params(
    files: WeightFiles,
    model: Model,
    shapes: Flat,
    dtype: np.dtype,
    quantize: str | None,
    problems: list[str],
) -> Flat:
    """All parameters, one stacked leaf after the other; notes the bad tensors."""
    if model.mesh is not None:
        # Says what does not fit before anything is read.
        sharding.param_shardings(model.mesh, model.param_shapes())
    params: Flat = {}
    for row in families.tensors_of(model.config):
        shape = shapes[row.path].shape
        inner = shape[row.stacks :]
        tensor = functools.partial(_tensor, files, row.pattern, inner, problems)
        whole = functools.partial(tensor, np.float32, [(0, n) for n in inner])
        leaves = hf_quantized.read(files, row, shape, quantize, whole)
        if leaves is None:
            own = dtype if tensors.is_narrow(row.path) else np.dtype(np.float32)
            read = _leaf_reader(functools.partial(tensor, own), row, shape, own)
            params[row.path] = _placed(model.mesh, row.path, shape, read)
            continue
        for name, x in leaves.items():
            path = f"{row.path}/{name}"
            params[path] = _placed(model.mesh, path, x.shape, x.__getitem__)
    return params


def _placed(mesh: Mesh | None, path: str, shape: tuple[int, ...], read) -> jax.Array:
    """The parameter whose slices `read` gives, where the mesh wants it."""
    if mesh is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    tree = unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, sep="/")
    (where,) = jax.tree.leaves(sharding.param_shardings(mesh, tree))
    # Wait, so that the host copy is freed before the next leaf is read.
    return jax.make_array_from_callback(shape, where, read).block_until_ready()


def _tensor(
    files: WeightFiles, pattern: str, shape, problems: list[str], dtype, spans, name
) -> np.ndarray:
    """The part of a tensor that spans of its parameter cover; notes a bad one."""
    x = _read_part(files, name, pattern, shape, spans).astype(dtype, copy=False)
    if not np.isfinite(x.astype(np.float32, copy=False)).all():
        problems.append(f"{name} is not finite")
    return x


def _leaf_reader(
    tensor: Callable[..., np.ndarray], row: tensors.Tensor, shape, dtype
) -> Callable[[Any], np.ndarray]:
    """Index of a stacked parameter -> that slice, read by `tensor`(spans, name).

    Devices that hold the same slice share one read.
    """

    @functools.cache
    def read(spans: tuple[tuple[int, int], ...]) -> np.ndarray:
        counted, inner = spans[: row.stacks], spans[row.stacks :]
        out = np.empty([stop - start for start, stop in spans], dtype)
        for place in np.ndindex(*(stop - start for start, stop in counted)):
            index = [i + start for i, (start, _) in zip(place, counted, strict=True)]
            out[place] = tensor(inner, row.name.format(*index))
        return out

    def at(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return read(tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)))

    return at


def _read_part(files: WeightFiles, name: str, pattern: str, shape, spans):
    """The part of a tensor that spans of its parameter cover, regrouped as that is."""
    left, right = pattern.split(" -> ")
    sizes = dict(zip(right.split(), shape, strict=True))
    span_of = dict(zip(right.split(), spans, strict=True))
    cut, parts = [], {}
    for outer, *rest in tensors.groups(left):
        # Of a group such as (n h) the outer axis is cut and the rest are whole.
        width = math.prod(sizes[axis] for axis in rest)
        start, stop = span_of[outer]
        cut.append(slice(start * width, stop * width))
        parts |= {outer: stop - start} | {axis: sizes[axis] for axis in rest}
    return einops.rearrange(files.read(name, tuple(cut)), pattern, **parts)


def save(
    path: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    *,
    max_shard_size: int = 2_000_000_000,
) -> None:
    """Writes a checkpoint that transformers (4 and 5) and `load` read.

    Collective: every process calls it, process 0 writes. Host memory: a stacked leaf.
    An older checkpoint in the folder is replaced, see hf_writing.checkpoint.

    Args:
      path: the folder, created where it is missing.
      model, params: as of `load`; weights keep the dtype of the parameters.
      tokenizer: of transformers, written beside the weights; or None.
      max_shard_size: bytes; a file holds at most that much, but at least one tensor.

    Raises: ValueError where params do not fit the model, are quantized, or are not
      finite; nothing is touched then.
    """
    if is_quantized(params):
        raise ValueError(
            f"{path} is not written: its kernels are quantized, and a checkpoint of "
            "them would have lost what they had; save the adapters, and merge them "
            "into the full-precision model (jalign merge)"
        )
    folder, write = Path(path), sharding.is_main_process()
    shapes = jax.tree.map(lambda x: x.shape, params)
    if shapes != jax.tree.map(lambda x: x.shape, model.param_shapes()):
        raise ValueError("params do not have the names and shapes of the model")
    flat: Flat = flatten_dict(params, sep="/")
    for row in families.tensors_of(model.config):
        if not sharding.gather(_all_finite(flat[row.path])):
            raise ValueError(f"{path} is not written: {row.path} is not finite")
    dtype = str(flat["embed/embedding"].dtype)
    config, generation = config_to_hf(settled(model.config, tokenizer), dtype)
    files = checkpoint(folder, config, generation, tokenizer)
    with files if write else contextlib.nullcontext(set()) as written:
        written |= _write_weights(folder, model.config, flat, max_shard_size, write)
    if write:
        _log.info("wrote %s: %d weight file(s)", folder, len(written))
    sharding.barrier(f"models.save {path}")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _write_weights(
    folder: Path, config: ModelConfig, params: Flat, max_bytes: int, write: bool
) -> set[str]:
    """Writes files as they fill up; returns the names of all weight files."""
    plan = _plan(config, params, max_bytes)
    tensors = _tensors(config, params)
    if write:
        return write_shards(folder, plan, lambda name: Written(dict([next(tensors)])))
    collections.deque(tensors, maxlen=0)  # gathering takes every process
    return set()


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


def _tensors(config: ModelConfig, params: Flat) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every tensor, gathering one stacked leaf at a time."""
    for row in _rows(config, params):
        leaf = sharding.gather(params[row.path])
        parts = leaf.reshape(-1, *leaf.shape[row.stacks :])
        left, right = row.pattern.split(" -> ")
        for name, part in zip(row.names(leaf.shape), parts, strict=True):
            x = einops.rearrange(part, f"{right} -> {left}")
            assert x.shape == tensors.file_shape(row.pattern, part.shape)
            yield name, np.ascontiguousarray(x)
