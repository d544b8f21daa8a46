"""A process that has stopped moving ends itself, and says where it stood.

A dead or stopped host is found by jax's heartbeat (`multihost.initialize`). A thread of
its own sends that, so it goes on while Python waits for ever: in a computation that
another process has not entered, for a lock, or for rows. This is for such a process.
"""

import contextlib
import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator

import jax

EXIT_STUCK = 76
"""The exit code of a process that `watched` has ended."""
SEVERAL_PROCESSES = 1800.0
"""Seconds that a run of several processes waits by default."""
COMPILED = "/jax/core/compile/backend_compile_duration"
_STDERR = 2  # the descriptor: what Python calls stderr may be a notebook's


@contextlib.contextmanager
def watched(timeout: float | None = None) -> Iterator[None]:
    """Ends this process where nothing has been finished for too long.

    Signs of life are a batch that was placed (put_batch), an array that was fetched
    (gather), a step that was taken, a program that was compiled, and `alive`. The
    first one starts the clock, so that loading may take its time, and compiling a
    program that is `announced` stops it; its first run has SEVERAL_PROCESSES seconds
    at least, since another process may still compile it. In the end host, process,
    last step and the stacks of all threads go to stderr, and the process ends with
    EXIT_STUCK, at once: cleaning up would wait as well. The other processes end by
    their own watch, or by the heartbeat of this one.

    Args:
      timeout: seconds without a sign of life; 0 waits for ever; None is
        SEVERAL_PROCESSES, and for ever where there is one process only.
    """
    global _watch
    if timeout is None:
        timeout = SEVERAL_PROCESSES if jax.process_count() > 1 else 0.0
    if not timeout:
        yield
        return
    outer, watch = _watch, _Watch(timeout)
    _watch = watch
    watch.start()
    try:
        yield
    finally:
        _watch = outer
        watch.stop()


def alive(finished: str = "", *, computed: bool = True) -> None:
    """A sign of life: call it when something has been finished on this process.

    Args:
      finished: what it was, for the message ("step 12"); unset tells nothing new.
      computed: whether all that the devices were given before is computed by now.
    """
    if _watch is not None:
        _watch.sign(finished, computed=computed)


def compiling(name: str) -> None:
    """Stops the clock until the program of this name is compiled, or `alive`."""
    if _watch is not None:
        _watch.hold(name)


class _Watch(threading.Thread):
    """Waits until the last sign of life is too old."""

    def __init__(self, timeout: float):
        super().__init__(name="jalign watchdog", daemon=True)
        self._timeout = self._limit = timeout
        self._where = f"process {jax.process_index()} of {jax.process_count()}"
        self._finished = "nothing yet"
        self._since: float | None = None  # of the last sign; None: the clock stands
        self._program: str | None = None  # that is being compiled
        self._over = threading.Event()

    def start(self) -> None:
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        super().start()

    def stop(self) -> None:
        self._over.set()
        self._since = None
        faulthandler.cancel_dump_traceback_later()
        jax.monitoring.unregister_event_duration_listener(self._compiled)

    def sign(self, finished: str = "", *, computed: bool) -> None:
        self.check()  # too late after SIGSTOP and SIGCONT: the others are gone
        self._finished = finished or self._finished
        self._limit = self._timeout if computed else self._limit
        self._program, self._since = None, time.monotonic()
        # Needs no GIL, which a thread that hangs in C may hold; but cannot say much,
        # and ends with 1. Each call takes the place of the one before.
        later = 1.05 * self._limit + 1.0
        faulthandler.dump_traceback_later(later, exit=True, file=_STDERR)

    def hold(self, program: str) -> None:
        self._program, self._since = program, None
        self._limit = max(self._timeout, SEVERAL_PROCESSES)
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        often = self._timeout / 20
        while not self._over.wait(min(self._left(), often)):
            self.check()

    def check(self) -> None:
        if self._left() <= 0:
            self._end()

    def _left(self) -> float:
        since = self._since
        return self._limit - (0.0 if since is None else time.monotonic() - since)

    def _compiled(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED and self._program is not None:
            if self._program in str(about.get("fun_name")):
                self.sign(computed=False)

    def _end(self) -> None:
        try:
            text = (
                f"\nerror: {self._where} on {socket.gethostname()} (pid {os.getpid()}) "
                f"is stuck: no sign of life for more than {self._limit:g} s; last "
                f"finished: {self._finished}. It ends with exit code {EXIT_STUCK}; "
                "where its threads are:\n"
            )
            os.write(_STDERR, text.encode())
            faulthandler.dump_traceback(file=_STDERR)
        finally:
            os._exit(EXIT_STUCK)


_watch: _Watch | None = None
