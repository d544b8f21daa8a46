"""Checkpoint folders, written a tensor at a time."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jalign.models import hf_files

_log = logging.getLogger("jalign.models")
Json = dict[str, Any]
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What weights may be, in safetensors' spelling -> NumPy's."""
_SPELLED = {name: key for key, name in DTYPES.items()}
_SPELLED |= {"float64": "F64", "int32": "I32"}
_ENTRY_BYTES = 160  # of a header: more than what it says of a tensor beside its name


class Written(NamedTuple):
    """What is written for one tensor of a checkpoint.

    Attributes:
      arrays: by their names in the file.
      note: kept under the tensor's name in the file's metadata; "" is none.
    """

    arrays: Mapping[str, np.ndarray]
    note: str = ""


class TensorWriter:
    """A safetensors file that grows by a tensor; whole at the end, or not there.

    The library writes only what is in memory at once. The format is: the header's
    length in 8 bytes; the header, JSON, blanks at its end allowed; the arrays' bytes.
    Arrays of larger items go first, so that all are aligned.
    """

    def __init__(self, file: Path, header_bytes: int):
        self._file, self._room = file, -(-header_bytes // 8) * 8
        self._temporary = file.with_name(file.name + ".tmp")
        # transformers refuses files that do not say which framework they are for.
        self._notes, self._tensors = {"format": "pt"}, {}
        self.num_bytes = 0

    def __enter__(self) -> "TensorWriter":
        self._out = self._temporary.open("wb")
        self._out.seek(8 + self._room)
        return self

    def add(self, written: Written, name: str) -> list[str]:
        """Appends what there is of a tensor; returns its names in the file."""
        for key, x in written.arrays.items():
            start, self.num_bytes = self.num_bytes, self.num_bytes + x.nbytes
            self._tensors[key] = {
                "dtype": _SPELLED[str(x.dtype)],
                "shape": x.shape,
                "data_offsets": [start, self.num_bytes],
            }
            self._out.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        if written.note:
            self._notes[name] = written.note
        return [*written.arrays]

    def __exit__(self, kind: Any, *_: object) -> None:
        with self._out:
            header = json.dumps({"__metadata__": self._notes} | self._tensors).encode()
            assert len(header) <= self._room
            self._out.seek(0)
            self._out.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        if kind is None:
            os.replace(self._temporary, self._file)
        else:
            self._temporary.unlink()


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[str]],
    make: Callable[[str], Written],
    *,
    name: str = hf_files.WEIGHTS,
    most_arrays: int = 1,
) -> set[str]:
    """Writes weight files, and their index where there are several.

    Args:
      folder: that is there.
      shards: names of the tensors in each file.
      make: name of a tensor -> what is written for it; called in that order.
      name: of the file where there is one; the others are called after it.
      most_arrays: that `make` gives.

    Returns: the names of all that was written.
    """
    stem, end, total = *name.rsplit(".", 1), len(shards)
    names = [f"{stem}-{i:05d}-of-{total:05d}.{end}" for i in range(1, 1 + total)]
    names = [name] if total == 1 else names
    size, weight_map = 0, {}
    for file, tensors in zip(names, shards, strict=True):
        room = sum(len(t) + _ENTRY_BYTES for t in tensors) * most_arrays + 64
        with TensorWriter(folder / file, room) as writer:
            for tensor in tensors:
                # Not held by a name here while the next one is made.
                weight_map |= dict.fromkeys(writer.add(make(tensor), tensor), file)
        size += writer.num_bytes
        if total > 1:
            _log.info("wrote %s, of %d", folder / file, total)
    if total == 1:
        return {*names}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    hf_files.write_json(folder / f"{name}.index.json", index)
    return {*names, f"{name}.index.json"}


@contextlib.contextmanager
def checkpoint(
    folder: Path, config: Json, generation: Json, tokenizer: Any
) -> Iterator[set[str]]:
    """All of a checkpoint but its weights, which are written inside of the `with`.

    config.json goes first and the new one comes last, so that a torn write is no model.

    Args:
      folder: created where it is missing; an older checkpoint in it is replaced.
      config, generation: as of config_to_hf.
      tokenizer: of transformers, or None.

    Yields: a set that takes the names of the weight files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    written: set[str] = set()
    yield written
    hf_files.remove_weights(folder, but=written)
    if tokenizer is not None:
        hf_files.save_tokenizer(folder, tokenizer)
    hf_files.write_json(folder / "generation_config.json", generation)
    hf_files.write_json(folder / "config.json", config)
