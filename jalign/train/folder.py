"""Folders that are there whole or not at all."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from jalign import sharding

_log = logging.getLogger("jalign.train")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` once it is complete.

    A kill leaves the old `target` or none, and TARGET.partial, which the next call
    removes. Files of other names that lie in an old `target` stay. Collective.
    """
    partial = target.with_name(f"{target.name}.partial")
    old = target.with_name(f"{target.name}.old")
    main = sharding.is_main_process()
    if main:
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)
    sharding.barrier(f"begin {target}")
    try:
        yield partial
    except BaseException:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    sharding.barrier(f"written {target}")
    if main:
        if target.exists():
            _keep_others(target, partial)
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        _log.info("%s is complete", target)
    sharding.barrier(f"end {target}")


def _keep_others(old: Path, new: Path) -> None:
    """Copies what a user has put beside the weights (a README) into the new folder."""
    for file in old.iterdir():
        stale = ".safetensors" in file.name or (new / file.name).exists()
        if file.is_file() and not stale:
            shutil.copy2(file, new / file.name)
