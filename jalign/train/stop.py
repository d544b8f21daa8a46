"""SIGTERM and SIGINT: a run that is asked to stop leaves in good order, at any time."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax

from jalign import sharding

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
