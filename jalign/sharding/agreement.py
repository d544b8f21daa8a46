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

from jalign.sharding.blocks import PIECE_BYTES

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
    texts = gather_bytes(b"" if value is None else json.dumps(value).encode())
    return [json.loads(text.tobytes()) if len(text) else None for text in texts]


def gather_bytes(data: bytes | memoryview) -> list[np.ndarray]:
    """Every process's bytes, uint8 [N], in the order of the processes. Collective.

    They go over the devices in pieces, of which each device holds PIECE_BYTES at most
    (but 1 KiB of each process at least), and a host its own copy of all bytes.
    """
    own, count = np.frombuffer(data, np.uint8), jax.process_count()
    if count == 1:
        return [own]
    size = np.array(divmod(own.size, _HALF), np.int32)  # jax has no int64 by default
    halves = np.asarray(multihost_utils.process_allgather(size), np.int64)
    sizes = halves @ (_HALF, 1)
    found = [np.empty(size, np.uint8) for size in sizes]
    start, largest = 0, max(_SMALL, PIECE_BYTES // count)
    while (left := int(sizes.max()) - start) > 0:
        # Of few different sizes, since each one is compiled.
        piece = next(n for n in _pieces(largest) if n >= min(left, largest))
        row = np.zeros(piece, np.uint8)
        part = own[start : start + piece]
        row[: len(part)] = part
        rows = np.asarray(multihost_utils.process_allgather(row))
        for whole, part in zip(found, rows, strict=True):
            place = whole[start : start + piece]
            place[:] = part[: len(place)]
        start += piece
    return found


_TOLD = "_on_every_process"  # attribute of an error that all have, or one like it
_HALF = 2**30
_SMALL = 2**10  # bytes


def _pieces(largest: int) -> Iterator[int]:
    """Sizes of pieces, up to the largest."""
    piece = _SMALL
    while piece < largest:
        yield piece
        piece *= 8
    yield largest


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A block that ends on every process, or fails on every process. Collective.

    Inside, what comes after something that may fail is no collective, or first of all
    another such block: it then ends with the error of whoever has left this one.

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
    if not getattr(error, _TOLD, False):  # by a block inside this one
        said = gather_objects(error and f"{type(error).__name__}: {error}")
        for process, text in enumerate(said):
            if text is not None and error is None:
                error = OSError(f"{what}: process {process} failed: {text}")
    if error is not None:
        setattr(error, _TOLD, True)
        raise error
