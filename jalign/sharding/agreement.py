"""What one process meets all processes learn: values, and errors.

An error on one process alone leaves the others in a collective that has no end.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in the order of the processes. Collective.

    Args:
      value: of JSON. None on every process costs one short exchange.
    """
    if jax.process_count() == 1:
        return [value]
    text = b"" if value is None else json.dumps(value).encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text))))
    if not sizes.any():
        return [None] * len(sizes)
    row = np.zeros(sizes.max(), np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    texts = [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
    return [json.loads(text) if text else None for text in texts]


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block that ends on every process, or fails on every process. Collective.

    Inside, nothing is collective that comes after what may fail.

    Args:
      what: is done, for the message.

    Raises: what the block raises; where it raised on other processes only, OSError
      that names the first of them, with its message.
    """
    error = None
    try:
        yield
    except Exception as fault:  # told to the others, whatever it is, and raised here
        error = fault
    said = gather_objects(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for process, text in enumerate(said):
        if text is not None:
            raise OSError(f"{what}: process {process} failed: {text}")
