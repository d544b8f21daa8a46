"""What a process asks of the machine that it runs on."""

import ctypes
import importlib.util
import sys
from importlib.metadata import entry_points

import jax

# Of glibc's malloc.h: number of heaps, of mapped blocks, and when to give back.
_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1


def keep_freed_memory() -> bool:
    """Has the process keep the memory that it frees, for its next allocation.

    XLA on a CPU asks for all temporaries of a program at each call and frees them after
    it; glibc gives so large a block back to the system, which fills it with zeros anew,
    a page at a time. On two cores that took a quarter of an SFT step of a 7M model. In
    return the process stays as large as it ever was.

    Call it before jax's first computation. `jalign COMMAND` does.

    Returns: whether it had an effect. Nothing is done, and it is False, with another C
      library, and where jax may have a GPU or TPU, on which nothing would be gained.
    """
    if not sys.platform.startswith("linux") or _may_have_accelerator():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    # One heap that never shrinks: a thread's own heap is too small for large blocks.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def _may_have_accelerator() -> bool:
    """Without starting a backend, which would come too early."""
    if jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        return False
    plugins = entry_points(group="jax_plugins")
    return bool(plugins) or importlib.util.find_spec("libtpu") is not None
