"""How the examples of a batch lie in rows: each in one of its own, or several in one.

What takes least work on a sample of batches is taken for all of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.data.batching import bucket_length
from jalign.data.examples import PreferenceExample, filler
from jalign.data.packing import PackedPairs, PackedRow, fill_rows

SAMPLE = 16
"""Batches from which it is judged whether packing pays."""

_ATTENTION = 4096  # row length at which attention is taken to cost what the rest does
_PAYS = 0.9  # of the work without packing: for less, rows are better kept apart


class Layout(NamedTuple):
    """How batches lie in rows.

    Attributes:
      lengths: tokens of each side of each example [n, sides].
      limit: the longest padded row without packing.
      row_length: of packed rows; 0 where a side has a row of its own.
      parts: that a host's examples are packed in, each by itself.
      places: for examples in a part.
      quantum: what the number of a part's packed rows is a multiple of.
      hosts: how many share a batch.
    """

    lengths: np.ndarray
    limit: int
    row_length: int
    parts: int
    places: int
    quantum: int
    hosts: int


class Part(NamedTuple):
    """Some examples of a batch, packed into rows.

    Attributes:
      examples: their indices, -1 for filler.
      rows: of each row the sides, `sides * place + side`, place in `examples`; the last
        rows may be empty.
    """

    examples: list[int]
    rows: list[list[int]]


def choose_layout(
    examples: Sequence[Any],
    batch_size: int,
    max_length: int,
    pack_rows: int,
    hosts: int,
    sample: Sequence[np.ndarray],
) -> Layout:
    """Packed rows of the length that takes least work for the sample, if it is less.

    The sides of a pair need each other, so pairs are packed in parts, of which a device
    or a micro-batch has its own. Other rows may go anywhere: all are one part.

    Args:
      examples: all examples; rows of `pack` stay as they are.
      batch_size: examples of a global batch.
      max_length: the longest padded row without packing.
      pack_rows: parts that a global batch is cut into by devices and micro-batches;
        0: do not pack.
      hosts: how many share a batch.
      sample: indices of the examples of some global batches; SAMPLE of them are used.
    """
    lengths = np.array([_side_lengths(example) for example in examples])
    pieces = max(1, pack_rows) // math.gcd(max(1, pack_rows), hosts)
    share, sides = batch_size // hosts, lengths.shape[1]
    parts = pieces if sides > 1 else 1
    # At most 8 numbers of rows occur, or 16 for two sides.
    quantum = -(-share // (8 * pieces)) * (pieces // parts)
    longest = bucket_length(int(lengths.max()), max_length)
    places = -(-share // parts)
    layouts = [Layout(lengths, max_length, 0, parts, places, quantum, hosts)]
    if pack_rows and not isinstance(examples[0], PackedRow):
        layouts += [layouts[0]._replace(row_length=n * longest) for n in (1, 2, 4)]
    work = [_work(layout, batch_size, sample[:SAMPLE]) for layout in layouts]
    best = int(np.argmin(work))
    return layouts[best if work[best] < _PAYS * work[0] else 0]


def length_of(indices: np.ndarray, layout: Layout) -> int:
    """The padded length of the rows of a global batch."""
    longest = int(layout.lengths[indices].max())
    return layout.row_length or bucket_length(longest, layout.limit)


def packed_parts(indices: np.ndarray, layout: Layout) -> list[list[Part]]:
    """For each host, its parts of a global batch; all of equally many rows."""
    found = []
    for share in np.array_split(indices, layout.hosts):
        for part in np.array_split(share, layout.parts):
            rows = fill_rows(layout.lengths[part].ravel(), layout.row_length)
            members = part.tolist() + [-1] * (layout.places - len(part))
            found.append(Part(members, rows))
    most = max(len(part.rows) for part in found)
    count = -(-most // layout.quantum) * layout.quantum
    for part in found:
        part.rows.extend([] for _ in range(count - len(part.rows)))
    each = layout.parts
    return [found[i : i + each] for i in range(0, len(found), each)]


def assemble(parts: Sequence[Part], examples: Sequence[Any]) -> list[Any]:
    """A host's parts as `collate_preferences` or `collate_tokens` takes them."""
    if not isinstance(examples[0], PreferenceExample):
        return [
            [examples[part.examples[i]] for i in row]
            for part in parts
            for row in part.rows
        ]
    none = filler(examples[0])
    return [
        PackedPairs([none if i < 0 else examples[i] for i in part.examples], part.rows)
        for part in parts
    ]


def _work(layout: Layout, batch_size: int, sample: Sequence[np.ndarray]) -> float:
    """Padded tokens of the batches, with attention's share, in no particular unit."""
    total = 0.0
    for indices in sample:
        length, rows = length_of(indices, layout), batch_size * layout.lengths.shape[1]
        if layout.row_length:
            parts = packed_parts(indices, layout)
            rows = sum(len(part.rows) for share in parts for part in share)
        total += rows * length * (1 + length / _ATTENTION)
    return total


def _side_lengths(example: Any) -> list[int]:
    if isinstance(example, PreferenceExample):
        return [len(example.chosen.tokens), len(example.rejected.tokens)]
    return [len(example.tokens)]
