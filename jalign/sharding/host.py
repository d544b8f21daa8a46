"""The memory of the process itself."""

import ctypes
import functools
import sys

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 0.5  # seconds; shorter compilations leave little behind


@functools.cache
def give_back_compiler_memory() -> None:
    """From now on, gives what a compilation has freed back to the system.

    glibc keeps freed memory for later: 300 MiB after compiling a step of a small model,
    which then lie beside the step's own. Does nothing where there is no glibc.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return
    jax.monitoring.register_event_duration_secs_listener(_after)


def _after(event: str, duration_secs: float, **_) -> None:
    if event == _COMPILED and duration_secs >= _LONG:
        ctypes.CDLL(None).malloc_trim(0)
