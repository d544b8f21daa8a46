"""Where a user's files are: on a disk, or behind a URL (gs://, s3://, memory://, ...).

`located` makes of a text a pathlib.Path; of a URL a `upath.UPath`, which has the same
methods, by the library that fsspec knows for it. What differs between the two is here:
an object store has no folders, no rename, no append and no reading by mmap.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Of one request: many at once are faster than one stream.
_RANGE_BYTES, _RANGES = 2**24, 16


def is_url(source: str | Path) -> bool:
    """Whether a text begins as a URL does."""
    return bool(_URL.match(str(source)))


def is_remote(path: PurePath) -> bool:
    """Whether what `located` has given is behind a URL."""
    return not isinstance(path, PurePath)


def located(source: str | Path) -> Path:
    """The path that a user's text names: a Path as it is, or a UPath of a URL.

    Raises: ValueError that names the package to install where the URL's library is
      missing; OSError where its store cannot be reached, whatever is there.
    """
    if isinstance(source, PurePath) or not is_url(source):
        return Path(source)
    if not isinstance(source, str):  # it has been located before
        return source
    if urlsplit(source).scheme == "file":
        return Path(unquote(urlsplit(source).path))
    path = _remote(source)
    # `exists` says no to a wrong password, too.
    with reaching(path), contextlib.suppress(FileNotFoundError):
        _fs(path).info(path.path)  # pyright: ignore[reportAttributeAccessIssue]
    return path


def _remote(url: str) -> Path:
    scheme = urlsplit(url).scheme
    try:
        import fsspec
        from fsspec.registry import known_implementations

        fsspec.get_filesystem_class(scheme)
        from upath import UPath  # pyright: ignore[reportMissingImports]
    except ValueError:
        known = ", ".join(sorted(known_implementations))
        raise ValueError(f"{url}: {scheme}:// is not one of {known}") from None
    except ImportError as error:
        said = str(known_implementations.get(scheme, {}).get("err", error))
        said = f"{said}, and" if "upath" not in str(error) else "To use URLs,"
        raise ValueError(f'{url}: {said} pip install "jalign[remote]"') from error
    try:
        path: Any = UPath(url)
        path.fs  # noqa: B018 - reads the user's credentials
    except Exception as error:  # of a dozen libraries
        raise ValueError(f"{url}: {type(error).__name__}: {error}") from error
    return path


def fresh(path: Path) -> Path:
    """The path, of which nothing is known from before: others write there, too."""
    if is_remote(path):
        path.fs.invalidate_cache()  # pyright: ignore[reportAttributeAccessIssue]
    return path


def _fs(path: Path) -> Any:
    """The file system of a remote path."""
    return fresh(path).fs  # pyright: ignore[reportAttributeAccessIssue]


def joined(folder: Path, name: str) -> Path:
    """A path from a folder; an object store knows no "..", so that it is worked out."""
    path = folder / name
    return path.resolve() if is_remote(path) else path


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Makes an OSError that names the path of what a store's library raises."""
    try:
        yield
    except Exception as error:
        if not is_remote(path):
            raise
        said = f"cannot be reached: {type(error).__name__}: {error}"
        number = errno.EIO
        if isinstance(error, FileNotFoundError):
            said, number = f"is not there ({error})", errno.ENOENT
        raise OSError(number, said, str(path)) from error


def make_folder(path: Path) -> None:
    """Makes a folder that is missing; an object store needs none."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def children(folder: Path) -> list[Path]:
    """What lies in a folder; in an object store nothing where there is none."""
    if not is_remote(folder):
        return sorted(folder.iterdir())
    root: Any = folder
    try:
        with reaching(folder):
            found = _fs(folder).ls(root.path, detail=False)
    except FileNotFoundError:
        return []
    names = {name.strip("/") for name in found} - {root.path.strip("/")}
    return [folder / name.rpartition("/")[2] for name in sorted(names)]


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and of the folders in it, in the order of their names."""
    if not is_remote(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    root: Any = folder
    with reaching(folder):
        found = _fs(folder).find(root.path)
    start = root.path.rstrip("/") + "/"
    names = (name.removeprefix(start) for name in sorted(found))
    # Some tools keep an empty object for a folder.
    return [folder / name for name in names if name and not name.endswith("/")]


def write_text(file: Path, text: str) -> None:
    """Writes a text in UTF-8; where the folder is not there, FileNotFoundError."""
    with reaching(file):
        file.write_text(text, encoding="utf-8")


def remove_tree(path: Path) -> None:
    """Removes a folder and all in it, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with reaching(path), contextlib.suppress(FileNotFoundError):
        _fs(path).rm(path.path, recursive=True)  # pyright: ignore[reportAttributeAccessIssue]


def move(path: Path, target: Path) -> None:
    """Calls a folder by another name; in an object store every object is copied."""
    if not is_remote(path):
        path.rename(target)
        return
    one, two = path.path, target.path  # pyright: ignore[reportAttributeAccessIssue]
    with reaching(path):
        found = _fs(path).find(one)
        names = [two + name.removeprefix(one) for name in found]
        _fs(path).copy(found, names, on_error="raise")
    remove_tree(path)


def upload(file: Path, target: Path) -> None:
    """Copies a file of this disk to a remote path, where it is then whole, or not."""
    with reaching(target):
        _fs(target).put_file(str(file), target.path)  # pyright: ignore[reportAttributeAccessIssue]


def download(path: Path, target: Path) -> None:
    """Copies a remote file to this disk."""
    make_folder(target.parent)
    with reaching(path):
        _fs(path).get_file(path.path, str(target))  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def on_disk(path: Path, *names: str) -> Iterator[Path]:
    """A file as one of this disk: itself, or a copy that goes away at the end.

    Args:
      path: the file; or the folder, where names are given.
      names: ends of the names of the files that are wanted of a folder, ".json".
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jalign-") as folder:
        here = Path(folder, path.name)
        if not names:
            download(path, here)
        else:
            make_folder(here)
            start = len(str(path).rstrip("/")) + 1
            for file in files_below(path):
                if file.name.endswith(names):
                    download(file, here / str(file)[start:])
        yield here


@contextlib.contextmanager
def written(file: Path) -> Iterator[Path]:
    """A path of this disk to write a file at, which is then there whole or not at all.

    A remote file is first written to the folder for temporary files (TMPDIR).
    """
    if is_remote(file):
        with tempfile.TemporaryDirectory(prefix="jalign-") as folder:
            yield (here := Path(folder, file.name))
            upload(here, file)
        return
    temporary = file.with_name(file.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # what is not whole


class _Ranges(io.RawIOBase):
    """A remote file that is read where it is asked for, and nowhere else."""

    def __init__(self, path: Path):
        self._path, self._at, self.name = path, 0, str(path)
        with reaching(path):
            self._size = path.stat().st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_CUR: self._at, os.SEEK_END: self._size}.get(whence, 0)
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As many bytes as the buffer holds, or the file has."""
        out = memoryview(buffer).cast("B")
        out = out[: max(0, self._size - self._at)]
        for first in range(0, len(out), _RANGE_BYTES * _RANGES):
            self._fetch(out[first : first + _RANGE_BYTES * _RANGES])
        return len(out)

    def _fetch(self, out: memoryview) -> None:
        starts = range(0, len(out), _RANGE_BYTES)
        sizes = [min(_RANGE_BYTES, len(out) - start) for start in starts]
        begins = [self._at + start for start in starts]
        ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
        path: Any = self._path
        with reaching(path):
            names = [path.path] * len(ends)
            parts = path.fs.cat_ranges(names, begins, ends, on_error="raise")
        if [len(part) for part in parts] != sizes:
            raise OSError(f"{path}: its server gives no parts of files, or it changed")
        for start, part in zip(starts, parts, strict=True):
            out[start : start + len(part)] = part
        self._at += len(out)


def open_to_read(path: Path, *, ahead: bool = True) -> Any:
    """A file's bytes, as `open` gives them.

    Args:
      ahead: a remote one is read from its start to its end, and so much at a time; else
        no more of it than is asked for.
    """
    if not is_remote(path):
        return path.open("rb")
    return io.BufferedReader(_Ranges(path), _RANGE_BYTES) if ahead else _Ranges(path)
