"""What has to be the same on every process, compared before they compute together."""

import hashlib
import json
import socket
from collections.abc import Mapping
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
    everyone = _allgather_json({"host": socket.gethostname(), "texts": texts})
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


def _allgather_json(value: Any) -> list[Any]:
    """The value of each process, in their order."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.pad(text, (0, int(max(lengths)) - len(text)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


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
