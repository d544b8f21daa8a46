"""One run at a time in an OUT."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jalign import sharding
from jalign.paths import fresh, is_remote, reaching
from jalign.sharding import agreement

_log = logging.getLogger("jalign.train")


@contextlib.contextmanager
def lock_directory(out: Path) -> Iterator[None]:
    """Holds OUT/.lock, which the system releases however the process ends. Collective.

    An object store has no locks: there the object says who works here, and who finds
    one that was not removed only warns, since a killed run leaves it, too.

    Raises: ValueError naming the other process if it is held; OSError where OUT cannot
      be written; on every process.
    """
    with contextlib.ExitStack() as stack:
        with agreement.together(f"opening {out}"):
            if sharding.is_main_process():
                hold = _marked if is_remote(out) else _locked
                stack.enter_context(hold(out, out / ".lock"))
        yield


@contextlib.contextmanager
def _locked(out: Path, lock: Path) -> Iterator[None]:
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{out}: another run is working here ({file.read().strip()}); "
                "wait for it, or use another --out"
            ) from None
        file.truncate(0)
        file.write(f"{_me()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def _marked(out: Path, lock: Path) -> Iterator[None]:
    with reaching(lock):
        if fresh(lock).is_file():
            other = lock.read_text(encoding="utf-8").strip()
            _log.warning(
                "%s: a run (%s) has not said that it ended; if it still works here, "
                "stop one of the two",
                out,
                other,
            )
        lock.write_text(f"{_me()}\n", encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError), reaching(lock):
            lock.unlink(missing_ok=True)


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
