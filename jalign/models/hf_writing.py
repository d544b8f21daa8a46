"""Checkpoint folders, written a tensor at a time, by one process or by several."""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jalign.models import hf_files, hf_output
from jalign.paths import is_remote, make_folder, written
from jalign.sharding import agreement

_log = logging.getLogger("jalign.models")
Json = dict[str, Any]
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What weights may be, in safetensors' spelling -> NumPy's."""
_SPELLED = {name: key for key, name in DTYPES.items()}
_SPELLED |= {"float64": "F64", "int32": "I32"}
Share = tuple[int, int]
"""(this process, how many write together)."""
_ALONE = 0, 1
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
        # transformers refuses files that do not say which framework they are for.
        self._notes, self._tensors = {"format": "pt"}, {}
        self.num_bytes = 0

    def __enter__(self) -> "TensorWriter":
        with contextlib.ExitStack() as stack:
            here = stack.enter_context(written(self._file))
            self._out = stack.enter_context(here.open("wb"))
            stack.push(self._write_header)
            self._stack = stack.pop_all()
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

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _write_header(self, kind: Any, *_: object) -> None:
        if kind is not None:  # what is not whole goes
            return
        header = json.dumps({"__metadata__": self._notes} | self._tensors).encode()
        assert len(header) <= self._room
        self._out.seek(0)
        self._out.write(self._room.to_bytes(8, "little") + header.ljust(self._room))


def write_shards(
    folder: Path,
    shards: Sequence[Sequence[str]],
    make: Callable[[str], Written],
    *,
    name: str = hf_files.WEIGHTS,
    most_arrays: int = 1,
    join: Callable[[str], Any] = lambda name: None,
    share: Share = _ALONE,
) -> set[str]:
    """Writes weight files, and their index where there are several.

    Of n processes each writes every n-th file: they make a tensor each, one after
    another, and then write these at the same time.

    Args:
      folder: that is there, for all processes.
      shards: names of the tensors in each file.
      make: name of a tensor -> what is written for it.
      name: of the file where there is one; the others are called after it.
      most_arrays: that `make` gives; 1 where there are several processes.
      join: is called where another process makes the tensor, in the same order.
      share: of this process.

    Returns: the names of all that was written, by all.
    """
    stem, end, total = *name.rsplit(".", 1), len(shards)
    names = [f"{stem}-{i:05d}-of-{total:05d}.{end}" for i in range(1, 1 + total)]
    names = [name] if total == 1 else names
    size, weight_map, count = 0, {}, share[1]
    for first in range(0, total, count):
        files = [folder / file for file in names[first : first + count]]
        group = shards[first : first + count]
        added, num_bytes = _write_group(files, group, make, most_arrays, join, share)
        weight_map |= added
        size += num_bytes
        if total > 1:
            _log.info("wrote %d of %d weight files", first + len(group), total)
    if total == 1:
        return {*names}
    if count > 1:
        sizes, maps = zip(*agreement.gather_objects([size, weight_map]), strict=True)
        size, weight_map = sum(sizes), {k: f for part in maps for k, f in part.items()}
        weight_map = dict(sorted(weight_map.items(), key=lambda item: item[1]))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    with _together(folder, share):
        if share[0] == 0:
            hf_output.write_json(folder / f"{name}.index.json", index)
    return {*names, f"{name}.index.json"}


def _together(folder: Path, share: Share) -> contextlib.AbstractContextManager:
    """A block that fails on all processes where it fails on one."""
    if share[1] == 1:
        return contextlib.nullcontext()
    return agreement.together(f"writing {folder}")


def _write_group(
    files: Sequence[Path],
    shards: Sequence[Sequence[str]],
    make: Callable[[str], Written],
    most_arrays: int,
    join: Callable[[str], Any],
    share: Share,
) -> tuple[dict[str, str], int]:
    """A file by each process, or by the first ones; see `write_shards`.

    Returns: (name of each array -> file, number of bytes) of this process's.
    """
    me, weight_map, writer = share[0], {}, None
    with contextlib.ExitStack() as stack:
        with _together(files[0].parent, share):
            if me < len(files):
                room = sum(len(t) + _ENTRY_BYTES for t in shards[me]) * most_arrays
                writer = stack.enter_context(TensorWriter(files[me], room + 64))
        for tensors in itertools.zip_longest(*shards):
            written = None  # not held while the next one is made
            for process, tensor in enumerate(tensors):
                if process == me and tensor is not None:
                    written = make(tensor)
                elif tensor is not None:
                    join(tensor)
            with _together(files[0].parent, share):
                if writer is not None and written is not None:
                    arrays = writer.add(written, tensors[me])
                    weight_map |= dict.fromkeys(arrays, files[me].name)
        with _together(files[0].parent, share):
            stack.close()  # the header is written last
    return weight_map, 0 if writer is None else writer.num_bytes


@contextlib.contextmanager
def checkpoint(
    folder: Path, config: Json, generation: Json, tokenizer: Any, share: Share = _ALONE
) -> Iterator[set[str]]:
    """All of a checkpoint but its weights, which are written inside of the `with`.

    config.json goes first and the new one comes last, so that a torn write is no model.

    Args:
      folder: created where it is missing; an older checkpoint in it is replaced.
      config, generation: as of config_to_hf.
      tokenizer: of transformers, or None.
      share: of this process. The first one does this.

    Yields: a set that takes the names of the weight files.
    """
    with _together(folder, share):
        if share[0] == 0:
            make_folder(folder)
            (folder / "config.json").unlink(missing_ok=True)
    with _together(folder, share):
        _check_shared(folder, share)
    written: set[str] = set()
    yield written
    with _together(folder, share):
        if share[0] == 0:
            hf_output.remove_weights(folder, but=written)
            if tokenizer is not None:
                hf_output.save_tokenizer(folder, tokenizer)
            hf_output.write_json(folder / "generation_config.json", generation)
            hf_output.write_json(folder / "config.json", config)


def _check_shared(folder: Path, share: Share) -> None:
    """Raises OSError where this process does not see what the first one has made."""
    if not is_remote(folder) and not folder.is_dir():
        raise OSError(
            f"{folder} is not on the host of process {share[0]}, though process 0 has "
            "made it: put it on a file system that all hosts share"
        )
