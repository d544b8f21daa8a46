"""What makes a checkpoint damaged: bad bytes, and not an error on the way to them.

A step that is damaged is given up; one that cannot be reached (permissions, a failing
disk, memory) is as good as it was once the cause is gone.
"""

import errno
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Of tensorstore's messages.
_OS_ERROR = re.compile(r"OS error (\d+)")
_NO_DAMAGE = re.compile(r"PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAVAILABLE|CANCELLED")
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Damaged(Exception):
    """A step that cannot be read back as it was written."""


def agreed(read: Callable[[], Any]) -> Any:
    """read() on every process; an error on all of them where one has it."""
    result, error = None, None
    try:
        result = read()
    except (Damaged, OSError, MemoryError) as fault:
        error = fault
    if jax.process_count() > 1:
        kind = 0 if error is None else 1 if isinstance(error, Damaged) else 2
        worst = int(np.max(multihost_utils.process_allgather(np.asarray(kind))))
        if error is None and worst:
            text = "another process cannot read it"
            error = Damaged(text) if worst == 1 else OSError(f"checkpoint: {text}")
    if error is not None:
        raise error
    return result


def check_readable(
    path: Path, error: BaseException, files: Iterable[Path] = ()
) -> None:
    """Raises what is behind an error, unless it is that the bytes themselves are bad.

    Args:
      path: of the step.
      error: what reading it has raised.
      files: to read once more, whatever the error says: it may hide its cause.

    Raises: MemoryError; OSError for anything but a missing file.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            raise MemoryError(f"not enough memory to read {path}") from error
        text, number = str(cause), getattr(cause, "errno", None)
        if found := _OS_ERROR.search(text):
            number = int(found[1])
        if number is not None and number not in _MISSING:
            raise OSError(number, os.strerror(number), str(path)) from error
        if number is None and _NO_DAMAGE.search(text):
            raise OSError(f"{path} cannot be read: {first_line(cause)}") from error
        cause = cause.__cause__ or cause.__context__
    for file in files:
        if file.is_file():
            with open(file, "rb") as data:
                while data.read(1 << 24):
                    pass


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
