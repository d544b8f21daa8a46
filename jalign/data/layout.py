"""How the examples of a batch lie in rows: each in one of its own, or several in one.

What takes least work on a sample of batches is taken for all of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.data.batching import bucket_length
from jalign.data.examples import PreferenceExample
from jalign.data.packing import PackedRow, fill_rows

SAMPLE = 16
"""Batches from which it is judged whether packing pays."""

_ATTENTION = 4096  # row length at which attention is taken to cost what the rest does
_PAYS = 0.9  # of the work without packing: for less, rows are better kept apart


class Layout(NamedTuple):
    """How batches lie in rows.

    Attributes:
      lengths: tokens of each side of each example [n, sides].
      limit: the longest padded row without packing.
      row_length: of packed rows; 0 where an example has a row of its own.
      quantum: what the number of a host's packed rows is a multiple of.
      hosts: how many share a batch.
    """

    lengths: np.ndarray
    limit: int
    row_length: int
    quantum: int
    hosts: int


def choose_layout(
    examples: Sequence[Any],
    batch_size: int,
    max_length: int,
    pack_rows: int,
    hosts: int,
    sample: Sequence[np.ndarray],
) -> Layout:
    """Packed rows of the length that takes least work for the sample, if it is less.

    Args:
      examples: all examples; rows of `pack` stay as they are.
      batch_size: examples of a global batch.
      max_length: the longest padded row without packing.
      pack_rows: what the packed rows of all hosts are a multiple of; 0: do not pack.
      hosts: how many share a batch.
      sample: indices of the examples of some global batches; SAMPLE of them are used.
    """
    lengths = np.array([_side_lengths(example) for example in examples])
    quantum = _row_quantum(batch_size // hosts, pack_rows or 1, hosts)
    longest = bucket_length(int(lengths.max()), max_length)
    layouts = [Layout(lengths, max_length, 0, quantum, hosts)]
    if pack_rows and not isinstance(examples[0], PackedRow):
        layouts += [layouts[0]._replace(row_length=n * longest) for n in (1, 2, 4)]
    work = [_work(layout, batch_size, sample[:SAMPLE]) for layout in layouts]
    best = int(np.argmin(work))
    return layouts[best if work[best] < _PAYS * work[0] else 0]


def length_of(indices: np.ndarray, layout: Layout) -> int:
    """The padded length of the rows of a global batch."""
    longest = int(layout.lengths[indices].max())
    return layout.row_length or bucket_length(longest, layout.limit)


def packed_rows(indices: np.ndarray, layout: Layout) -> list[list[list[int]]]:
    """For each host, for each of its rows, the examples; equally many rows."""
    filled = []
    for part in np.array_split(indices, layout.hosts):
        rows = fill_rows(layout.lengths[part], layout.row_length)
        filled.append([part[row].tolist() for row in rows])
    quantum = layout.quantum
    count = -(-max(map(len, filled)) // quantum) * quantum
    return [rows + [[]] * (count - len(rows)) for rows in filled]


def _work(layout: Layout, batch_size: int, sample: Sequence[np.ndarray]) -> float:
    """Padded tokens of the batches, with attention's share, in no particular unit."""
    total = 0.0
    for indices in sample:
        length, rows = length_of(indices, layout), batch_size
        if layout.row_length:
            rows = layout.hosts * len(packed_rows(indices, layout)[0])
        total += rows * length * (1 + length / _ATTENTION)
    return total


def _side_lengths(example: Any) -> list[int]:
    if isinstance(example, PreferenceExample):
        return [len(example.chosen.tokens), len(example.rejected.tokens)]
    return [len(example.tokens)]


def _row_quantum(share: int, pack_rows: int, hosts: int) -> int:
    """What the rows of a host are a multiple of: at most 8 numbers of rows occur."""
    least = pack_rows // math.gcd(pack_rows, hosts)
    return least * -(-share // (8 * least))
