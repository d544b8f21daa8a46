"""What processes learn of each other: values that are to be the same, and errors.

An error on one process alone leaves the others in a collective that has no end.
"""

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MOST = 8  # differences, and processes with the same value, that a message lists


def agree(name: str, value: Any) -> None:
    """Stops all processes when they differ in a value: settings, data, code version.

    Different settings otherwise end in a deadlock of collectives, without a message.

    Args:
      name: what the value is, for the message.
      value: anything whose repr determines it; of (nested) mappings the message names
        the keys that differ.

    Raises: ValueError on every process, with what differs and who has which value.
    """
    if jax.process_count() == 1:
        return
    texts = _texts(name, value)
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    if (np.asarray(digests) == digests[0]).all():
        return
    everyone = gather_objects({"host": socket.gethostname(), "texts": texts})
    found = [other["texts"] for other in everyone]
    keys = [key for key in sorted(set().union(*found)) if not _same(key, found)]
    told = [_who_has_what(key, everyone) for key in keys[:_MOST]]
    more = f"; and {len(keys) - _MOST} more" if len(keys) > _MOST else ""
    raise ValueError(
        f"the processes differ in {name}: {'; '.join(told)}{more}. Start the same "
        "command, from the same install and with the same data, on every host"
    )


def _texts(name: str, value: Any) -> dict[str, str]:
    """Key -> text of the value; the keys of nested mappings stand for themselves."""
    if not isinstance(value, Mapping):
        return {name: repr(value)}
    texts = {}
    for key, part in value.items():
        nested = isinstance(part, Mapping)
        texts |= _texts(key, part) if nested else {str(key): str(part)}
    return texts


def _same(key: str, found: list[dict[str, str]]) -> bool:
    return len({texts.get(key) for texts in found}) == 1


def _who_has_what(key: str, everyone: list[dict[str, Any]]) -> str:
    """ "KEY is A on process 0 (host), B on processes 1, 2 (host)"."""
    groups: dict[str, list[int]] = {}
    for index, other in enumerate(everyone):
        groups.setdefault(other["texts"].get(key, "not there"), []).append(index)
    told = []
    for text, members in groups.items():
        some = ", ".join(map(str, members[:_MOST])) + ", ..." * (len(members) > _MOST)
        short = text if len(text) <= 100 else f"{text[:100]}..."
        plural = "es" if len(members) > 1 else ""
        host = everyone[members[0]]["host"]
        told.append(f"{short} on process{plural} {some} ({host})")
    return f"{key} is {', '.join(told)}"


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
