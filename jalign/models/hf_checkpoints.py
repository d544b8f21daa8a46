"""Checkpoints opened side by side, and one written that is cut as they are.

Nothing is read before the headers have shown that it fits, and never more than a tensor
at a time.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from jalign.models import families, hf_files
from jalign.models.config import ModelConfig
from jalign.models.hf_config import config_to_hf, read_config, settled
from jalign.models.hf_files import WeightFiles
from jalign.models.hf_headers import name_as_the_family, problems_of
from jalign.models.hf_writing import DTYPES, Written, checkpoint, write_shards
from jalign.models.model import Model
from jalign.models.tensors import Tensor, counts, file_shape

_log = logging.getLogger("jalign.models")
# Fields of a ModelConfig that say nothing of what is computed.
_NOT_COMPUTED = {"max_position", "family", "generation"}
_NOT_COMPUTED |= {"bos_token_id", "eos_token_ids", "pad_token_id"}


class Out(NamedTuple):
    """Where a checkpoint goes, and what is not its weights.

    Attributes:
      folder: the path; not one of the inputs.
      config: of the model, its special tokens settled.
      tokenizer: of transformers, or None.
    """

    folder: Path
    config: ModelConfig
    tokenizer: Any = None


def rows_of(config: ModelConfig) -> dict[str, tuple[Tensor, int]]:
    """Name of each tensor -> its row of the table, and its layer."""
    return {
        name: (row, layer)
        for row in families.tensors_of(config)
        for layer, name in enumerate(row.names(counts(config)))
    }


def file_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a file."""
    shapes: dict[str, Any] = flatten_dict(Model(config).param_shapes(), sep="/")
    found = {}
    for name, (row, _) in rows_of(config).items():
        inner = shapes[row.path].shape[row.stacks :]
        found[name] = file_shape(row.pattern, inner)
    return found


def check_alike(folders: Sequence[Path], but: set[str] | None = None) -> None:
    """Raises ValueError naming the first key in which models compute differently.

    Args:
      folders: with a config.json.
      but: fields of ModelConfig that may differ.
    """
    skip = _NOT_COMPUTED | (but or set())
    first, *others = [(folder, read_config(folder)) for folder in folders]
    for folder, config in others:
        for field in (f.name for f in dataclasses.fields(config)):
            one, two = getattr(first[1], field), getattr(config, field)
            if field in skip or one == two:
                continue
            key = families.keys_of(config.family).get(field, field)
            raise ValueError(
                f"{first[0]} and {folder} are not of one kind: {key} is {one} and {two}"
            )


@contextlib.contextmanager
def opened(folders: Sequence[Path]) -> Iterator[list[WeightFiles]]:
    """Weights of models. Raises ValueError that lists each tensor that is missing,
    unexpected or misshapen."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(WeightFiles(folder)) for folder in folders]
        for each in files:
            _check(each, read_config(each.folder))
        yield files


def _check(files: WeightFiles, config: ModelConfig) -> None:
    shapes: dict[str, Any] = flatten_dict(Model(config).param_shapes(), sep="/")
    name_as_the_family(files, config)
    problems = problems_of(files, config, shapes)
    tensors = [name for name in rows_of(config) if name in files]
    codes = [name for name in tensors if files.dtype(name) not in DTYPES]
    if codes and not problems:
        problems = [
            f"{codes[0]} and {len(codes) - 1} more are quantized: give the "
            "full-precision model that they were made of"
        ]
    if problems:
        raise ValueError(hf_files.report(files.folder, problems))


def read(files: WeightFiles, name: str) -> np.ndarray:
    """A tensor. Raises ValueError where it is not finite."""
    x = files.read(name)
    if not np.isfinite(x).all():
        raise ValueError(f"{files.folder}: {name} is not finite")
    return x


def write(
    out: Out,
    like: WeightFiles,
    dtypes: Mapping[str, np.dtype],
    make: Callable[[str], Written],
    **how: Any,
) -> None:
    """Writes a checkpoint whose files are cut as those of another.

    Args:
      out: where it goes.
      like: the other one's; what it lacks comes into the last file.
      dtypes: of each tensor.
      make, how: see write_shards.
    """
    dtype = str(dtypes[families.tied_names(out.config)[1]])
    config, generation = config_to_hf(settled(out.config, out.tokenizer), dtype)
    last = max(like.file_of.values())
    shards: dict[str, list[str]] = {}
    # Larger items first, as TensorWriter wants them.
    for name in sorted(rows_of(out.config), key=lambda name: -dtypes[name].itemsize):
        shards.setdefault(like.file_of.get(name, last), []).append(name)
    with checkpoint(out.folder, config, generation, out.tokenizer) as written:
        parts = [shards[file] for file in sorted(shards)]
        written |= write_shards(out.folder, parts, make, **how)
    _log.info("wrote %s: %d weight file(s)", out.folder, len(written))
