"""The files of a checkpoint folder: found, bounded, and read slice by slice."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MAX_INDEX_BYTES = 64 * 2**20
_HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def model_folder(path: str | Path) -> Path:
    """A local folder as it is; a hub id downloaded, and the folder that it is in.

    Raises: FileNotFoundError where it is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(path)):
        raise FileNotFoundError(f"model {path}: no such folder, and not a hub id")
    from huggingface_hub import snapshot_download

    try:
        # The weights of other frameworks, and pickles, are not fetched.
        return Path(snapshot_download(str(path), allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub raises a dozen types, of several libraries
        raise FileNotFoundError(
            f"model {path}: no such folder, and the hub says: {error}"
        ) from error


class WeightFiles:
    """All tensors of a checkpoint folder by name, opened but not read.

    Attributes:
      problems: what is wrong with the files themselves.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}

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
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype by the header, in safetensors' spelling: F32, BF16, ..."""
        return self._where[name].get_slice(name).get_dtype()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it at `index`; reads only those bytes."""
        if not index:
            return self._where[name].get_tensor(name)
        return self._where[name].get_slice(name)[index]

    def _file_names(self) -> tuple[list[str], dict[str, str]]:
        """The weight files, and the index tensor -> file (empty without one)."""
        file = self.folder / INDEX
        if not file.is_file():
            if (self.folder / WEIGHTS).is_file():
                return [WEIGHTS], {}
            raise FileNotFoundError(
                f"{self.folder} has neither {WEIGHTS} nor {INDEX} "
                "(.bin and .pt files are not read: they can run code)"
            )
        if file.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"{file} is larger than {_MAX_INDEX_BYTES >> 20} MiB")
        try:
            index = dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: not a weight index ({error!r})") from error
        return sorted({str(name) for name in index.values()}), index

    def _open(self, name: str, index: dict[str, str]) -> None:
        from safetensors import SafetensorError, safe_open

        file = self.folder / name
        if not _SAFE_NAME.fullmatch(name) or not self._inside(file):
            self.problems.append(f"weight file {name!r} is outside of the folder")
            return
        if not file.is_file():
            self.problems.append(f"weight file {name} is missing")
            return
        try:
            handle = self._stack.enter_context(safe_open(file, "np"))
            tensors = list(handle.keys())
        except (SafetensorError, OSError) as error:
            self.problems.append(f"weight file {name} is damaged: {error}")
            return
        for tensor in tensors:
            if tensor in self._where:
                self.problems.append(f"duplicate tensor {tensor}")
            elif index and index.get(tensor) != name:
                self.problems.append(f"{tensor} is in {name} but not so in the index")
            self._where.setdefault(tensor, handle)

    def _inside(self, file: Path) -> bool:
        """Whether the file, symlinks followed, lies in the folder.

        The hub's cache is repo/snapshots/commit/, of links to repo/blobs/.
        """
        root = self.folder.resolve()
        if root.parent.name == "snapshots":
            root = root.parent.parent
        return file.resolve().is_relative_to(root)
