"""Reads Hugging Face checkpoints: strictly, and tensor by tensor to its shards.

Only safetensors files are ever opened (a pickle can run code), and only after their
headers have shown that they hold exactly the tensors of the model.
"""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import families
from jalign.models.config import ModelConfig
from jalign.models.hf_config import config_from_hf
from jalign.models.hf_files import WeightFiles, model_folder
from jalign.models.model import Model, Params

_log = logging.getLogger("jalign.models")
_DTYPES = ("F32", "F16", "BF16")


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    attention: str = "auto",
) -> tuple[Model, Params]:
    """Loads a Hugging Face checkpoint of a family in families.FAMILIES.

    Every process reads only the slices that its devices hold. Peak host memory is one
    stacked leaf (one kind of tensor over all layers), not the model.

    Args:
      path: a folder, or a hub id such as "org/name", which is downloaded.
      mesh: of sharding.make_mesh; None puts everything on the default device.
      dtype: of activations and matmul inputs, see Model.
      param_dtype: of the parameters; float32 for training.
      remat, attention: see Model.

    Returns: the model and its parameters. A ...ForSequenceClassification with one
      label gives a model with a scalar head (num_labels=1).
    Raises: FileNotFoundError where there is no checkpoint. ValueError that lists all
      missing, unexpected, duplicate, misshapen and non-finite tensors, and wrong types.
    """
    folder = model_folder(path)
    config = read_config(folder)
    model = Model(config, mesh, dtype, remat, attention)  # pyright: ignore[reportArgumentType]
    shapes = model.param_shapes()
    with WeightFiles(folder) as files:
        problems = _header_problems(files, config, shapes)
        if problems:
            raise ValueError(_report(folder, problems))
        params, problems = _read_params(files, model, shapes, jnp.dtype(param_dtype))
    if problems:
        raise ValueError(_report(folder, problems))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    _log.info("loaded %s: %s, %.1fM parameters", folder, config.family, count / 1e6)
    return model, params


def read_config(folder: Path) -> ModelConfig:
    """ModelConfig of a checkpoint folder. Errors name the file and the key."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: not a model")
    generation = folder / "generation_config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        more = {}
        if generation.is_file():
            more = json.loads(generation.read_text(encoding="utf-8"))
        if not isinstance(raw, dict) or not isinstance(more, dict):
            raise ValueError("not a JSON object")
        return config_from_hf(raw, more)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def config_of(path: str | Path) -> ModelConfig:
    """ModelConfig of a folder or hub id, without its weights. Raises: as `load`."""
    return read_config(model_folder(path))


def _report(folder: Path, problems: list[str], most: int = 20) -> str:
    lines = [f"{folder}: {len(problems)} problem(s) with the weights"]
    lines += [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)


def _leaf(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def file_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in the file, from the parameter's (of one layer).

    For example ("(n h) d -> d n h", (64, 8, 16)) gives (128, 64).
    """
    left, right = pattern.split(" -> ")
    sizes = dict(zip(right.split(), shape, strict=True))
    return tuple(math.prod(sizes[name] for name in group) for group in _groups(left))


def _groups(side: str) -> list[list[str]]:
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", side)]


def _header_problems(
    files: WeightFiles, config: ModelConfig, shapes: Params
) -> list[str]:
    """Compares the files' headers with the model; reads no weights."""
    want: dict[str, tuple[int, ...]] = {}
    for row in families.tensors_of(config):
        shape = _leaf(shapes, row.path).shape
        if "{}" in row.name:
            expected = file_shape(row.pattern, shape[1:])
            want |= {row.name.format(i): expected for i in range(shape[0])}
        else:
            want[row.name] = file_shape(row.pattern, shape)
    problems = list(files.problems)
    problems += [f"missing tensor {name}" for name in want if name not in files]
    for name in files:
        got, dtype = files.shape(name), files.dtype(name)
        if name in want and got != want[name]:
            problems.append(f"{name} has shape {got}, the config says {want[name]}")
        elif name in want and dtype not in _DTYPES:
            problems.append(f"{name} has dtype {dtype}, not one of {_DTYPES}")
        elif name not in want and not _allowed(files, config, name):
            problems.append(f"unexpected tensor {name} {got}")
    return problems


def _allowed(files: WeightFiles, config: ModelConfig, name: str) -> bool:
    """Whether a tensor that the model lacks is one of the known harmless ones."""
    if any(re.fullmatch(pattern, name) for pattern in families.IGNORED_TENSORS):
        return True
    original = families.TIED_ORIGINAL
    if name != families.TIED_COPY or not config.tie_embeddings or config.num_labels:
        return False
    if original not in files or files.shape(name) != files.shape(original):
        return False
    return np.array_equal(files.read(name), files.read(original))


def _read_params(
    files: WeightFiles, model: Model, shapes: Params, dtype: np.dtype
) -> tuple[Params, list[str]]:
    """All parameters, one stacked leaf after the other, and the bad tensors' names."""
    shardings = None
    if model.mesh is not None:
        shardings = sharding.param_shardings(model.mesh, shapes)
    params: Params = {}
    problems: list[str] = []
    for row in families.tensors_of(model.config):
        shape = _leaf(shapes, row.path).shape
        leaf = _LeafReader(files, row, shape, dtype, problems)
        if shardings is None:
            value = jnp.asarray(leaf((slice(None),) * len(shape)))
        else:
            where = _leaf(shardings, row.path)
            value = jax.make_array_from_callback(shape, where, leaf)
            # Wait, so that the host copy is freed before the next leaf is read.
            value.block_until_ready()
        *parents, last = row.path.split("/")
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return params, problems


class _LeafReader:
    """Index of a stacked parameter -> that slice, read from the files.

    Devices that hold the same slice share one read.
    """

    def __init__(self, files, row: families.Tensor, shape, dtype, problems: list[str]):
        self.files, self.row, self.shape = files, row, shape
        self.dtype, self.problems = dtype, problems
        self.seen: dict[Any, np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        spans = tuple(
            range(*s.indices(n))[:] for s, n in zip(index, self.shape, strict=True)
        )
        key = tuple((span.start, span.stop) for span in spans)
        if key not in self.seen:
            self.seen[key] = self._read(key)
        return self.seen[key]

    def _read(self, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
        row = self.row
        if "{}" not in row.name:
            return self._tensor(row.name, spans, self.shape)
        (first, last), *inner = spans
        out = np.empty([b - a for a, b in spans], self.dtype)
        for i in range(first, last):
            name = row.name.format(i)
            out[i - first] = self._tensor(name, tuple(inner), self.shape[1:])
        return out

    def _tensor(self, name, spans, shape) -> np.ndarray:
        """One tensor's part, regrouped as the parameter is."""
        left, right = self.row.pattern.split(" -> ")
        names = right.split()
        sizes = dict(zip(names, shape, strict=True))
        span_of = dict(zip(names, spans, strict=True))
        cut, parts = [], {}
        for outer, *rest in _groups(left):
            # Of a group such as (n h) the outer axis is cut and the rest are whole.
            width = math.prod(sizes[name] for name in rest)
            start, stop = span_of[outer]
            cut.append(slice(start * width, stop * width))
            parts |= {outer: stop - start} | {name: sizes[name] for name in rest}
        x = self.files.read(name, tuple(cut)).astype(self.dtype)
        if not np.isfinite(x.astype(np.float32)).all():
            self.problems.append(f"{name} is not finite")
        return einops.rearrange(x, self.row.pattern, **parts)
