"""A run that is asked to stop (SIGTERM, SIGINT) leaves in good order, at any time, and
its folders are there whole or not at all."""

import contextlib
import itertools
import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jalign import sharding
from jalign.paths import is_remote, move
from jalign.sharding import agreement

_log = logging.getLogger("jalign.train")


class Preempted(BaseException):
    """The run was asked to stop (SIGTERM, SIGINT); nothing that it had saved is lost.

    No Exception, as KeyboardInterrupt is none: it may be raised anywhere, also where
    a library's errors are caught.
    """


class StopSignal:
    """A context in which SIGTERM and SIGINT end a run in good order.

    Preempted is raised at once where nothing can be lost (loading, evaluation,
    export); under `deferred`, the first signal only sets what `requested` tells. A
    second one of the same kind acts as it did outside of the context. With
    jax.distributed, signals are left to jax, whose notifier tells the other
    processes; then only `requested` sees them. Entered again, it changes nothing.
    """

    def __init__(self):
        self._name: str | None = None
        self._depth, self._deferred = 0, 0
        self._old: dict[int, Any] = {}

    def __enter__(self):
        self._depth += 1
        main = threading.current_thread() is threading.main_thread()
        if self._depth == 1 and main and not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        self._depth -= 1
        if not self._depth:
            for number, old in self._old.items():
                signal.signal(number, old)
            self._old = {}

    def _handle(self, number, _frame):
        self._name = signal.Signals(number).name
        signal.signal(number, self._old.pop(number))
        if not self._deferred:
            self._leave()
        _log.warning("%s: stopping after this step, with a checkpoint", self._name)

    def _leave(self):
        raise Preempted(
            f"stopped by {self._name}; the same command continues from the last "
            "checkpoint, if there is one"
        )

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Holds the stop back while there is something to lose.

        Raises: Preempted at the end if a stop was asked for, unless something else is
          being raised.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        if self._name and not self._deferred:
            self._leave()

    def hold(self) -> None:
        """Holds a first stop back for good: what is left to do takes a moment."""
        self._deferred += 1

    def requested(self, step: int) -> bool:
        """Whether to save and leave now; call it after every step. The same answer on
        every process."""
        return self._name is not None or sharding.preempted(step)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` once it is complete.

    A kill leaves the old `target` or none, and TARGET.partial, which the next call
    removes. Files of other names that lie in an old `target` stay. Collective.

    An object store has no rename: there it is `target` itself, and a kill leaves what
    its writer, who writes config.json last, lets no reader take for a model.
    """
    if is_remote(target):
        yield target
        _log.info("%s is complete", target)
        return
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
    with agreement.together(f"writing {target}"):
        if main:
            if target.exists():
                _keep_others(target, partial)
                target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            _log.info("%s is complete", target)


def set_aside(path: Path, why: str, first: int = 0) -> Path:
    """Nothing is deleted: a folder is called PATH.WHY, PATH.WHY1, ... Collective.

    Returns: the new path, on process 0.
    """
    sharding.barrier("set aside")
    target = path
    with agreement.together(f"renaming {path}"):
        if sharding.is_main_process():
            names = (f"{path.name}.{why}{n or ''}" for n in itertools.count(first))
            target = next(p for p in map(path.with_name, names) if not p.exists())
            move(path, target)
    return target


def _keep_others(old: Path, new: Path) -> None:
    """Copies what a user has put beside the weights (a README) into the new folder."""
    for file in old.iterdir():
        stale = ".safetensors" in file.name or (new / file.name).exists()
        if file.is_file() and not stale:
            shutil.copy2(file, new / file.name)
