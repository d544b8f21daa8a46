"""How the examples of a batch lie in rows: each in one of its own, or several in one.

What takes least work on a sample of batches is taken for all of them, in one shape or
two: each one is compiled, which may take longer than many steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.data.batching import bucket_length
from jalign.data.examples import PreferenceExample, filler
from jalign.data.packing import PackedPairs, PackedRow, fill_rows

_ATTENTION = 4096  # row length at which attention is taken to cost what the rest does
_PAYS = 0.9  # of the work without packing: for less, rows are better kept apart
_WORTH = 0.95  # of the work with one shape: for less, a second one is not compiled


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
      sizes: one or two, ascending, of which a batch has the first that holds it: rows
        of a part where they are packed, else their padded length.
    """

    lengths: np.ndarray
    limit: int
    row_length: int
    parts: int
    places: int
    quantum: int
    hosts: int
    sizes: tuple[int, ...] = ()


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
    batches: Sequence[np.ndarray] | None = None,
) -> Layout:
    """Packed rows of the length that takes least work for the batches, if it is less.

    The sides of a pair need each other, so pairs are packed in parts, of which a device
    or a micro-batch has its own. Other rows may go anywhere: all are one part.

    There are two sizes at most: one that holds whatever examples come together, and a
    smaller one where that saves work.

    Args:
      examples: all examples; rows of `pack` stay as they are.
      batch_size: examples of a global batch.
      max_length: the longest padded row without packing.
      pack_rows: parts that a global batch is cut into by devices and micro-batches;
        0: do not pack.
      hosts: how many share a batch.
      batches: indices of the examples of all global batches that there will be, so
        that one size is enough. None: of any, which are as a sample of them.
    """
    every = batches is not None
    if batches is None:
        batches = list(sample_batches(len(examples), batch_size))
    lengths = np.array([_side_lengths(example) for example in examples])
    pieces = max(1, pack_rows) // math.gcd(max(1, pack_rows), hosts)
    share, sides = batch_size // hosts, lengths.shape[1]
    parts = pieces if sides > 1 else 1
    longest = bucket_length(int(lengths.max()), max_length)
    places = -(-share // parts)
    apart = Layout(lengths, longest, 0, parts, places, pieces // parts, hosts)
    layouts = [apart]
    if pack_rows and not isinstance(examples[0], PackedRow):
        layouts += [apart._replace(row_length=n * longest) for n in (1, 2, 4)]
    sized = [_with_sizes(layout, batch_size, batches, every) for layout in layouts]
    work, best = min(sized, key=lambda pair: pair[0])
    return best if work < _PAYS * sized[0][0] else sized[0][1]


def sample_batches(n: int, batch_size: int) -> np.ndarray:
    """Indices of the examples of batches by which it is judged what is least work.

    Int64 [batches, batch_size], a function of the two numbers alone: so a run that goes
    on, to however many steps, has the same shapes, and so have all hosts.
    """
    random = np.random.RandomState(0)  # which NumPy keeps as it is
    batches = min(256, max(32, 8192 // batch_size))
    epochs = -(-batches * batch_size // n)
    order = np.concatenate([random.permutation(n) for _ in range(epochs)])
    return order[: batches * batch_size].reshape(batches, batch_size)


def choose_sizes(
    needs: Sequence[int],
    largest: int,
    work: Callable[[int], float],
    alone: float | None = None,
) -> tuple[int, ...]:
    """(a smaller size, largest) with the least work, or (largest,) if it is no less.

    Args:
      needs: the size that each batch of a sample has to have at least.
      largest: that holds every batch there may be.
      work: of a batch of a size.
      alone: of one of the largest size where it is the only one, if that is another.
    """
    found, whole = np.array(needs), work(largest)
    alone = whole if alone is None else alone

    def mean_work(size: int) -> float:
        fits = float(np.mean(found <= size))
        return fits * work(size) + (1 - fits) * whole

    best = min(map(int, np.unique(found)), key=mean_work)
    return (best, largest) if mean_work(best) <= _WORTH * alone else (largest,)


def length_of(indices: np.ndarray, layout: Layout) -> int:
    """The padded length of the rows of a global batch."""
    return layout.row_length or _first_that_holds(_need(indices, layout), layout)


def packed_parts(indices: np.ndarray, layout: Layout) -> list[list[Part]]:
    """For each host, its parts of a global batch; all of equally many rows."""
    found = _packed(indices, layout)
    count = _first_that_holds(max(len(part.rows) for part in found), layout)
    for part in found:
        part.rows.extend([] for _ in range(count - len(part.rows)))
    each = layout.parts
    return [found[i : i + each] for i in range(0, len(found), each)]


def balanced_order(examples: Sequence[Any], size: int) -> np.ndarray:
    """Indices of all examples, so that each `size` in a row have about equal lengths.

    By length, every n-th of the n lots: so batches that may have any order fill equally
    many rows.
    """
    by_length = np.argsort([sum(_side_lengths(x)) for x in examples], kind="stable")
    lots = -(-len(examples) // size)
    return np.concatenate([by_length[lot::lots] for lot in range(lots)])


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


def _packed(indices: np.ndarray, layout: Layout) -> list[Part]:
    """All hosts' parts of a global batch, behind each other, without empty rows."""
    found = []
    for share in np.array_split(indices, layout.hosts):
        for part in np.array_split(share, layout.parts):
            rows = fill_rows(layout.lengths[part].ravel(), layout.row_length)
            members = part.tolist() + [-1] * (layout.places - len(part))
            found.append(Part(members, rows))
    return found


def _need(indices: np.ndarray, layout: Layout) -> int:
    """The size that a global batch has to have at least."""
    if not layout.row_length:
        return bucket_length(int(layout.lengths[indices].max()), layout.limit)
    most = max(len(part.rows) for part in _packed(indices, layout))
    return -(-most // layout.quantum) * layout.quantum


def _first_that_holds(need: int, layout: Layout) -> int:
    return next(size for size in layout.sizes if size >= need)


def _with_sizes(
    layout: Layout, batch_size: int, batches: Sequence[np.ndarray], every: bool
) -> tuple[float, Layout]:
    """The layout with its sizes, and the work of the batches then."""
    needs = [_need(indices, layout) for indices in batches]

    def work(size: int) -> float:
        return _work(size, layout, batch_size)

    if every:
        return work(max(needs)), layout._replace(sizes=(max(needs),))
    sizes = choose_sizes(needs, _holds_all(layout), work)
    mean = np.mean([work(next(s for s in sizes if s >= need)) for need in needs])
    return float(mean), layout._replace(sizes=sizes)


def _holds_all(layout: Layout) -> int:
    """The size for any examples at all, whatever batches the run goes on to."""
    if not layout.row_length:
        return layout.limit
    # A row is opened where no other one has room, so all others have so many sides.
    in_each = layout.row_length // layout.limit
    most = -(-layout.places * layout.lengths.shape[1] // in_each)
    return -(-most // layout.quantum) * layout.quantum


def _work(size: int, layout: Layout, batch_size: int) -> float:
    """Padded tokens of a batch, with attention's share, in no particular unit."""
    rows, length = batch_size * layout.lengths.shape[1], size
    if layout.row_length:
        rows, length = size * layout.parts * layout.hosts, layout.row_length
    return rows * length * (1 + length / _ATTENTION)


def _side_lengths(example: Any) -> list[int]:
    if isinstance(example, PreferenceExample):
        return [len(example.chosen.tokens), len(example.rejected.tokens)]
    return [len(example.tokens)]
