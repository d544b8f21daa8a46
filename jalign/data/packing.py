"""Several documents in one row, told apart by segment ids."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample


class PackedRow(NamedTuple):
    """Several documents behind each other; fields as in `TokenBatch`, each [T]."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class PackedPairs(NamedTuple):
    """Pairs whose sides lie in common rows.

    Attributes:
      pairs: the P pairs; one without tokens is filler.
      rows: of each row the documents, 2 p for the chosen side of pair p and 2 p + 1
        for the rejected one.
    """

    pairs: Sequence[PreferenceExample]
    rows: Sequence[Sequence[int]]


def pack(examples: Sequence[Example], length: int) -> list[PackedRow]:
    """Puts whole documents into rows of at most `length` tokens, each exactly once.

    A function of the examples and the length only, over the whole data set.

    Raises: ValueError if an example is longer than `length`.
    """
    rows = fill_rows([len(example.tokens) for example in examples], length)
    return [join([examples[i] for i in row]) for row in rows]


def fill_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Which documents are put into the same row, of at most `row_length` tokens.

    Longest first, each into the fullest row that still has room (best fit decreasing).

    Args:
      lengths: tokens of each document; one without any is left out.

    Returns: the documents' indices, row by row.
    Raises: ValueError if one is longer than `row_length`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(np.flatnonzero(lengths).tolist(), key=lambda i: -lengths[i]):
        n = int(lengths[i])
        if n > row_length:
            raise ValueError(f"example of {n} tokens does not fit into {row_length}")
        place = bisect_left(room, (n, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
        if free > n:
            insort(room, (free - n, row))
    return rows


def join(
    documents: Sequence[Example], segments: Sequence[int] | None = None
) -> PackedRow:
    """The documents behind each other, as segments 1, 2, ... or as those given."""
    lengths = [len(document.tokens) for document in documents]
    masks = [np.array(document.completion_mask, bool) for document in documents]
    for mask in masks:
        mask[:1] = False  # nothing in this document predicts its first token
    numbers = range(1, len(lengths) + 1) if segments is None else segments
    ids = [np.full(n, number) for n, number in zip(lengths, numbers, strict=True)]
    none = [np.zeros(0, np.int32)]  # so that no document at all is a row too
    return PackedRow(
        tokens=np.concatenate([d.tokens for d in documents] or none).astype(np.int32),
        completion_mask=np.concatenate(masks or none).astype(bool),
        segment_ids=np.concatenate(ids or none).astype(np.int32),
        positions=np.concatenate([np.arange(n) for n in lengths] or none).astype(
            np.int32
        ),
    )
