"""Several documents in one row, told apart by segment ids."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jalign.data.encoding import Example

MAX_PACKED = 16
"""The most pairs in a row: a batch has an array with a place for each of them."""


class PackedRow(NamedTuple):
    """Several documents behind each other; fields as in `TokenBatch`, each [T]."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def pack(examples: Sequence[Example], length: int) -> list[PackedRow]:
    """Puts whole documents into rows of at most `length` tokens, each exactly once.

    Longest first, each into the fullest row that still has room (best fit decreasing):
    a function of the examples and the length only, over the whole data set.

    Raises: ValueError if an example is longer than `length`.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in order:
        n = len(examples[i].tokens)
        if n > length:
            raise ValueError(f"example of {n} tokens does not fit into {length}")
        place = bisect_left(room, (n, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        if free > n:
            insort(room, (free - n, row))
    return [join([examples[i] for i in row]) for row in rows]


def fill_rows(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """`pack` for the few examples of a batch, whose sides lie in rows of their own.

    Args:
      lengths: int [n, sides], tokens of each example: (chosen, rejected) of a pair.
      row_length: the most tokens of a side of a row.

    Returns: the indices of each row, at most MAX_PACKED. An example is in the same row
      on all sides.
    Raises: ValueError if one is longer than `row_length`.
    """
    if lengths.size and lengths.max() > row_length:
        raise ValueError(
            f"example of {lengths.max()} tokens does not fit into {row_length}"
        )
    rows: list[list[int]] = []
    room = np.zeros((0, lengths.shape[1]), int)
    for i in np.argsort(-lengths.max(axis=1), kind="stable"):
        left = room - lengths[i]
        free = np.array([len(row) < MAX_PACKED for row in rows], bool)
        fits = (left >= 0).all(axis=1) & free
        if not fits.any():
            rows.append([])
            room = np.vstack([room, np.full(lengths.shape[1], row_length)])
            row = len(rows) - 1
        else:
            row = int(np.argmin(np.where(fits, left.sum(axis=1), np.inf)))
        rows[row].append(int(i))
        room[row] -= lengths[i]
    return rows


def join(documents: Sequence[Example]) -> PackedRow:
    """The documents behind each other, as segments 1, 2, ..."""
    lengths = [len(document.tokens) for document in documents]
    masks = [np.array(document.completion_mask, bool) for document in documents]
    for mask in masks:
        mask[:1] = False  # nothing in this document predicts its first token
    ids = [np.full(n, number) for number, n in enumerate(lengths, start=1)]
    none = [np.zeros(0, np.int32)]  # so that no document at all is a row too
    return PackedRow(
        tokens=np.concatenate([d.tokens for d in documents] or none).astype(np.int32),
        completion_mask=np.concatenate(masks or none).astype(bool),
        segment_ids=np.concatenate(ids or none).astype(np.int32),
        positions=np.concatenate([np.arange(n) for n in lengths] or none).astype(
            np.int32
        ),
    )
