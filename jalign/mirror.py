"""Files that grow, or that a library writes to a disk only, for folders behind URLs."""

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from jalign.paths import download, files_below, fresh, is_remote, make_folder, upload

_log = logging.getLogger("jalign")
_PAUSE = 5.0  # seconds between two pushes that are not asked for


class Mirror:
    """A folder of this disk to write files into, which come to be in another one.

    Of a folder on this disk it is that folder itself, and `push` does nothing.

    Attributes:
      path: where to write.
    """

    def __init__(self, target: Path):
        self.path = self._target = target
        self._sent: dict[Path, tuple[int, int]] = {}
        self._due, self._failed = 0.0, False
        if is_remote(target):
            self.path = Path(tempfile.mkdtemp(prefix="jalign-"))
        make_folder(self.path)

    def bring(self, name: str) -> Path:
        """A file of the folder as it was left there, if it is there; its path here."""
        file = self._target / name
        if is_remote(file) and fresh(file).exists():
            download(file, self.path / name)
        return self.path / name

    def push(self) -> None:
        """Uploads the files that have changed. Raises: OSError."""
        if self.path is self._target:
            return
        for file in files_below(self.path):
            told = file.stat()
            seen = told.st_size, told.st_mtime_ns
            if self._sent.get(file) != seen:
                upload(file, self._target / file.relative_to(self.path).as_posix())
                self._sent[file] = seen

    def try_push(self, *, now: bool = False) -> None:
        """As push, where nothing is lost without it: a failure is logged, once.

        Args:
          now: else only now and then, so that it takes no more than a twentieth.
        """
        if self.path is self._target or not now and time.monotonic() < self._due:
            return
        start = time.monotonic()
        try:
            self.push()
            self._failed = False
        except OSError as error:
            if not self._failed:
                _log.error("%s; kept in %s until it can be written", error, self.path)
            self._failed = True
        taken = time.monotonic() - start
        self._due = start + max(_PAUSE, 21 * taken)

    def close(self) -> None:
        """Removes what is here, unless it could not be brought there."""
        if self.path is not self._target and not self._failed:
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None:
                self.push()
        finally:
            self.close()
