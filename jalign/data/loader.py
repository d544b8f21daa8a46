"""Batches in an order that is a function of (seed, epoch, index) and nothing else.

The rows of all epochs stand in one endless sequence, each epoch shuffled anew, and
step s takes rows s*B to (s+1)*B of it. So there is no iterator state: a run resumes
at a step, on any number of hosts, with the batches it would have had.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jalign.data.batching import bucket_length
from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample
from jalign.data.packing import PackedRow, fill_rows

logger = logging.getLogger("jalign.data")

Batch = TypeVar("Batch")
Collate = Callable[[Sequence[Any], int], Batch]

_SAMPLE = 16  # batches from which it is judged whether packing pays
_ATTENTION = 4096  # row length at which attention is taken to cost what the rest does
_PAYS = 0.9  # of the work without packing: for less, rows are better kept apart

_EMPTY = Example(np.zeros(0, np.int32), np.zeros(0, bool))


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Which of `n` examples make up the global batch of a step.

    Args:
      n: number of examples, at least 1.
      batch_size: rows of the global batch, over all hosts.
      seed: int in [0, 2**32).
      step: from 0.

    Returns: int64 [batch_size]. Every n consecutive places of the sequence hold each
      example once; a batch at the end of an epoch goes on with the next one.
    """
    order = _order(n, seed)
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array([order[place] for place in places], np.int64)


def num_steps(n: int, batch_size: int, epochs: float = 1) -> int:
    """Steps in which every example is seen at least `epochs` times."""
    return max(1, int(np.ceil(n * epochs / batch_size - 1e-9)))


def make_loader(
    examples: Sequence[Any],
    *,
    batch_size: int,
    seed: int,
    collate: Collate[Batch],
    max_length: int,
    pack_rows: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    start_step: int = 0,
    steps: int | None = None,
    epochs: float | None = None,
) -> Iterator[Batch]:
    """Yields this host's rows of the shuffled batches from `start_step` on.

    Args:
      examples: all examples, the same list on every host.
      batch_size: rows of the global batch.
      seed: of the order.
      collate: (examples, length) -> batch, e.g. `collate_tokens`.
      max_length: longest padded length. The length of a batch is the bucket of the
        longest example of the *global* batch, so that all hosts agree on it.
      pack_rows: if not 0, put the examples of a batch behind each other in as few rows
        as hold them, a multiple of this number over all hosts, where that saves work;
        rows of `pack` stay as they are.
        All rows have one length then and `collate` gets a list of lists of at most
        MAX_PACKED examples.
      shard_index, shard_count: this host and the number of hosts; a host gets a
        contiguous slice of batch_size / shard_count rows.
      start_step: the first step to yield.
      steps: end before this step; else after `epochs`; without both, never end.

    Raises: ValueError on no examples or a batch that does not divide over the hosts.
    """
    mine = _host_rows(len(examples), batch_size, shard_index, shard_count)
    order = _order(len(examples), seed)

    def indices(step: int) -> np.ndarray:
        places = range(step * batch_size, (step + 1) * batch_size)
        return np.array([order[place] for place in places])

    sample = [indices(step) for step in range(_SAMPLE if pack_rows else 0)]
    layout = _layout(examples, batch_size, max_length, pack_rows, shard_count, sample)
    make_batch = _batch_maker(examples, batch_size, collate, layout, mine)
    if steps is None and epochs is not None:
        steps = num_steps(len(examples), batch_size, epochs)
    if len(examples) < batch_size:
        logger.warning(
            "%d examples in batches of %d: examples repeat within a batch",
            len(examples),
            batch_size,
        )

    def batches():
        step = start_step
        while steps is None or step < steps:
            yield make_batch(indices(step))
            step += 1

    return batches()


def make_eval_loader(
    examples: Sequence[Any],
    *,
    batch_size: int,
    collate: Collate[Batch],
    max_length: int,
    pack_rows: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Yields this host's rows of every example once, in order.

    The last batch is filled up with rows without any segment, which count nothing, so
    that every batch has the same number of rows; a packed one may have fewer.
    Arguments as in `make_loader`.
    """
    mine = _host_rows(len(examples), batch_size, shard_index, shard_count)
    starts = range(0, len(examples), batch_size)
    batches = [np.arange(len(examples))[start : start + batch_size] for start in starts]
    layout = _layout(examples, batch_size, max_length, pack_rows, shard_count, batches)
    return map(_batch_maker(examples, batch_size, collate, layout, mine), batches)


class _Layout(NamedTuple):
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


def _layout(examples, batch_size, max_length, pack_rows, hosts, sample) -> _Layout:
    """Packed rows of the length that takes least work for the sample, if it is less."""
    lengths = np.array([_side_lengths(example) for example in examples])
    quantum = _row_quantum(batch_size // hosts, pack_rows or 1, hosts)
    longest = bucket_length(int(lengths.max()), max_length)
    layouts = [_Layout(lengths, max_length, 0, quantum, hosts)]
    if pack_rows and not isinstance(examples[0], PackedRow):
        layouts += [layouts[0]._replace(row_length=n * longest) for n in (1, 2, 4)]
    work = [_work(layout, batch_size, sample[:_SAMPLE]) for layout in layouts]
    best = int(np.argmin(work))
    return layouts[best if work[best] < _PAYS * work[0] else 0]


def _work(layout: _Layout, batch_size: int, sample: Sequence[np.ndarray]) -> float:
    """Padded tokens of the batches, with attention's share, in no particular unit."""
    total = 0.0
    for indices in sample:
        length, rows = layout.row_length, batch_size
        if length:
            rows = layout.hosts * len(_pack(indices, layout)[0])
        else:
            length = bucket_length(int(layout.lengths[indices].max()), layout.limit)
        total += rows * length * (1 + length / _ATTENTION)
    return total


def _batch_maker(examples, batch_size, collate, layout: _Layout, mine: slice):
    """A function from the indices of a global batch's examples to this host's rows."""
    seen: set[tuple[int, int]] = set()

    def make_batch(indices: np.ndarray):
        length = layout.row_length
        if length:
            rows = _pack(indices, layout)[mine.start // (mine.stop - mine.start)]
            batch = [[examples[i] for i in row] for row in rows]
        else:
            length = bucket_length(int(layout.lengths[indices].max()), layout.limit)
            batch = [examples[i] for i in indices]
            batch += [filler(batch[0])] * (batch_size - len(batch))
            batch = batch[mine]
        _log_new_shape((len(batch), length), seen)
        return collate(batch, length)

    return make_batch


def _side_lengths(example: Any) -> list[int]:
    if isinstance(example, PreferenceExample):
        return [len(example.chosen.tokens), len(example.rejected.tokens)]
    return [len(example.tokens)]


def _row_quantum(share: int, pack_rows: int, hosts: int) -> int:
    """What the rows of a host are a multiple of: at most 8 numbers of rows occur."""
    least = pack_rows // math.gcd(pack_rows, hosts)
    return least * -(-share // (8 * least))


def _pack(indices: np.ndarray, layout: _Layout) -> list[list[list[int]]]:
    """For each host, for each of its rows, the examples; equally many rows."""
    filled = []
    for part in np.array_split(indices, layout.hosts):
        rows = fill_rows(layout.lengths[part], layout.row_length)
        filled.append([part[row].tolist() for row in rows])
    quantum = layout.quantum
    count = -(-max(map(len, filled)) // quantum) * quantum
    return [rows + [[]] * (count - len(rows)) for rows in filled]


def filler(example: Any) -> Any:
    """An example of the same kind without tokens: a row that counts nothing."""
    if isinstance(example, PreferenceExample):
        return PreferenceExample(_EMPTY, _EMPTY)
    return _EMPTY


def _order(n: int, seed: int):
    """The endless sequence: place -> example."""
    import grain  # takes seconds to import

    if n < 1:
        raise ValueError("there are no examples to make batches of")
    return grain.MapDataset.range(n).seed(seed).shuffle()


def _host_rows(n: int, batch_size: int, index: int, count: int) -> slice:
    if n < 1:
        raise ValueError("there are no examples to make batches of")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size={batch_size} cannot be divided over {count} processes"
        )
    if not 0 <= index < count:
        raise ValueError(f"shard_index={index} is not in [0, {count})")
    share = batch_size // count
    return slice(index * share, (index + 1) * share)


def _log_new_shape(shape: tuple[int, int], seen: set[tuple[int, int]]) -> None:
    if shape not in seen:
        seen.add(shape)
        logger.info("batches of %d rows of length %d: one more compilation", *shape)
