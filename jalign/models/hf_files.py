"""The files of a checkpoint folder: found and bounded, and read by slices."""

import contextlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jalign.paths import (
    is_remote,
    located,
    open_to_read,
    reaching,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MAX_JSON_BYTES = 64 * 2**20
# Of a weight file: the names and shapes of some 200,000 tensors.
_MAX_HEADER_BYTES = 32 * 2**20
_CHUNK_BYTES = 2**24  # of whole rows that are read to be cut
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def model_folder(path: str | Path, *, revision: str | None = None) -> Path:
    """A folder as it is; a hub id downloaded, and the folder that it is in.

    Args:
      path: a folder or its URL, or a hub id such as "org/name".
      revision: of a hub id: its branch, tag or commit; None is the main branch.

    Raises: FileNotFoundError where it is neither.
    """
    folder = located(path).expanduser()
    if folder.is_dir():
        return folder
    if is_remote(folder):
        raise FileNotFoundError(f"model {path}: no such folder")
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"model {path}: no such folder, and not a hub id")
    from huggingface_hub import snapshot_download

    try:
        # The weights of other frameworks, and pickles, are not fetched.
        found = snapshot_download(
            str(path), revision=revision, allow_patterns=list(_HUB_FILES)
        )
        return Path(found)
    except Exception as error:  # the hub raises a dozen types, of several libraries
        raise FileNotFoundError(
            f"model {path}: no such folder, and the hub says: {error}"
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format, and no whole model.

    Some tools write the base's config.json beside it.
    """
    whole = any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    return (folder / ADAPTER_CONFIG).is_file() and not whole


def report(folder: Path, problems: list[str], most: int = 20) -> str:
    """What is wrong with a folder's weights, a line each."""
    lines = [f"{folder}: {len(problems)} problem(s) with the weights"]
    lines += [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a stranger's: bounded, each key once, all finite.

    Raises: ValueError naming the file; OSError.
    """
    with reaching(file):
        size = file.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise ValueError(f"{file} is larger than {_MAX_JSON_BYTES >> 20} MiB")
    with reaching(file):
        data = file.read_bytes()
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not usable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of JSON's pairs; NaN, Infinity and 1e999 are no JSON, but Python reads them."""
    value: dict[str, Any] = {}
    for key, x in pairs:
        if key in value:
            raise ValueError(f"key {key!r} is given twice")
        value[key] = x
        for item in x if isinstance(x, list) else [x]:
            if isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{key} is {item}")
    return value


class _Stored(NamedTuple):
    """Where a tensor is: safetensors' handle on its file and its name there, and the
    file, with the offset of its first byte. Of a remote file the handle knows the
    header only."""

    handle: Any
    name: str
    file: Any
    start: int


class WeightFiles:
    """All tensors of a checkpoint folder by name, opened but not read.

    Attributes:
      folder: where the files are.
      name: of the weight file, where there is one and no index of several.
      file_of: tensor -> name of its file.
      problems: what is wrong with the files themselves.
    """

    def __init__(self, folder: Path, name: str = WEIGHTS):
        self.folder, self.name = folder, name
        self.problems: list[str] = []
        self._stack = ExitStack()
        self.file_of: dict[str, str] = {}
        self._where: dict[str, _Stored] = {}

    def __enter__(self) -> "WeightFiles":
        names, index = self._file_names()
        for name in names:
            self._open(name, index)
        for tensor in index:
            if tensor not in self._where and not self.problems:
                self.problems.append(f"{tensor} is in the index but in no file")
        return self

    def __exit__(self, *exc: object) -> None:
        self._where.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._where))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape by the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype by the header, in safetensors' spelling: F32, BF16, ..."""
        return self._slice(name).get_dtype()

    def note(self, name: str) -> str:
        """What the metadata of its file says under its name, "" for nothing."""
        return (self._where[name].handle.metadata() or {}).get(name, "")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it at `index`; reads the bytes of its rows only.

        safetensors has the pages of a file in memory until it is closed, or reads all
        of a tensor.

        Raises: OSError.
        """
        stored, shape = self._where[name], self.shape(name)
        if not shape:
            x = np.array(stored.handle.get_tensor(stored.name))
            return self._filled(name, x, stored.start)
        dtype, inner = self._slice(name)[:0].dtype, tuple(index[1:])
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        first, stop, _ = (index[0] if index else slice(None)).indices(shape[0])
        whole = inner == (slice(None),) * len(inner)
        most = stop - first if whole else max(1, _CHUNK_BYTES // max(1, row_bytes))
        parts = []
        for start in range(first, stop, max(1, most)):
            rows = np.empty((min(most, stop - start), *shape[1:]), dtype)
            self._filled(name, rows, stored.start + start * row_bytes)
            parts.append(rows if whole else rows[:, *inner].copy())
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts or [np.empty((0, *shape[1:]), dtype)[:, *inner]])

    def _filled(self, name: str, x: np.ndarray, start: int) -> np.ndarray:
        """x, with the bytes of the tensor's file from `start` on."""
        file, data = self._where[name].file, x.reshape(-1).view(np.uint8)
        file.seek(start)
        if file.readinto(data.data) != data.size:
            raise OSError(f"{file.name} ends before {name} does")
        return x

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Calls each tensor by renamed(its name) from now on."""
        self._where = {renamed(name): x for name, x in self._where.items()}
        self.file_of = {renamed(name): file for name, file in self.file_of.items()}

    def _slice(self, name: str) -> Any:
        stored = self._where[name]
        return stored.handle.get_slice(stored.name)

    def _file_names(self) -> tuple[list[str], dict[str, str]]:
        """The weight files, and the index tensor -> file (empty without one)."""
        file = self.folder / f"{self.name}.index.json"
        if not file.is_file():
            if (self.folder / self.name).is_file():
                return [self.name], {}
            raise FileNotFoundError(
                f"{self.folder} has neither {self.name} nor {file.name} "
                "(.bin and .pt files are not read: they can run code)"
            )
        index = read_json(file).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{file}: not a weight index: weight_map is no mapping")
        return sorted({str(name) for name in index.values()}), index

    def _open(self, name: str, index: dict[str, str]) -> None:
        from safetensors import SafetensorError, safe_open

        file = self.folder / name
        # A store has no links.
        inside = is_remote(file) or self._inside(file)
        if not _SAFE_NAME.fullmatch(name) or not inside:
            self.problems.append(f"weight file {name!r} is outside of the folder")
            return
        if not file.is_file():
            self.problems.append(f"weight file {name} is missing")
            return
        data = self._stack.enter_context(open_to_read(file, ahead=False))
        header = int.from_bytes(data.read(8), "little")
        if header > _MAX_HEADER_BYTES:
            self.problems.append(
                f"weight file {name} is damaged: a header of {header} bytes"
            )
            return
        text = data.read(header)
        try:
            here = self._stack.enter_context(_with_header(file, header, text))
            handle = self._stack.enter_context(safe_open(here, "np"))
            tensors = list(handle.keys())
            entries = json.loads(text)  # which the library has checked
        except (SafetensorError, OSError) as error:
            self.problems.append(f"weight file {name} is damaged: {error}")
            return
        for tensor in tensors:
            if tensor in self._where:
                self.problems.append(f"duplicate tensor {tensor}")
            elif index and index.get(tensor) != name:
                self.problems.append(f"{tensor} is in {name} but not so in the index")
            start = 8 + header + entries[tensor]["data_offsets"][0]
            self._where.setdefault(tensor, _Stored(handle, tensor, data, start))
            self.file_of.setdefault(tensor, name)

    def _inside(self, file: Path) -> bool:
        """Whether the file, symlinks followed, lies in the folder.

        The hub's cache is repo/snapshots/commit/, of links to repo/blobs/.
        """
        root = self.folder.resolve()
        if root.parent.name == "snapshots":
            root = root.parent.parent
        return file.resolve().is_relative_to(root)


@contextlib.contextmanager
def _with_header(file: Path, size: int, text: bytes) -> Iterator[Path]:
    """A file that the library can open, to check and to know its header: a remote one
    is stood for by its header and a hole of its size."""
    if not is_remote(file):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="jalign-") as folder:
        here = Path(folder, file.name)
        here.write_bytes(size.to_bytes(8, "little") + text)
        os.truncate(here, file.stat().st_size)
        yield here
