"""Compilation, which takes seconds to minutes: said when it happens, with its time.

And its memory, which the command gives back.
"""

import ctypes
import functools
import logging
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jalign.sharding import watchdog

_log = logging.getLogger("jalign")


def announced(
    function: Callable[..., Any], words: Callable[..., str], **options: Any
) -> Callable[..., Any]:
    """`jax.jit(function)` that logs each of its compilations, and how long it took.

    Args:
      function: pure; jax calls it only when it has to compile, which is how we know.
      words: from the arguments of a call (tracers) to what is compiled, such as "the
        training step for batches of 8 x 512".
      **options: of jax.jit.

    Returns: the jitted function, with its `lower`.
    """
    started: list[str] = []
    calling: list[bool] = []

    @functools.wraps(function)
    def traced(*args, **kwargs):
        if calling and not started:
            started.append(words(*args, **kwargs))
            _log.info("compiling %s, once", started[0])
            watchdog.compiling(getattr(function, "__name__", ""))
        return function(*args, **kwargs)

    jitted = jax.jit(traced, **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        calling.append(True)
        start = time.perf_counter()
        try:
            result = jitted(*args, **kwargs)  # returns before it has run
            if started:
                watchdog.alive(computed=False)
                seconds = time.perf_counter() - start
                _log.info("... %s took %.1f s", started[0], seconds)
            return result
        finally:
            calling.clear()
            started.clear()

    setattr(call, "lower", jitted.lower)  # noqa: B010, a function has no such field
    return call


def batch_words(name: str, batch: Any) -> str:
    """ "NAME for batches of 8 x 512": rows and length of the batch's first array."""
    *rows, length = np.shape(jax.tree.leaves(batch)[0])
    return f"{name} for batches of {math.prod(rows)} x {length}"


_LONG = 0.5  # seconds; shorter compilations leave little behind


@functools.cache
def give_back_compiler_memory() -> None:
    """From now on, gives what a compilation has freed back to the system.

    glibc keeps freed memory for later: 300 MiB after compiling a step of a small model,
    which then lie beside the step's own. Does nothing where there is no glibc. The
    command calls it; a notebook may.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return
    jax.monitoring.register_event_duration_secs_listener(_after)


def _after(event: str, duration_secs: float, **_) -> None:
    if event == watchdog.COMPILED and duration_secs >= _LONG:
        ctypes.CDLL(None).malloc_trim(0)
