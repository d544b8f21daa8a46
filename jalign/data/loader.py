"""Batches in an order that is a function of (seed, epoch, index) and nothing else.

The rows of all epochs stand in one endless sequence, each epoch shuffled anew, and
step s takes rows s*B to (s+1)*B of it. So there is no iterator state: a run resumes
at a step, on any number of hosts, with the batches it would have had.

The examples of a batch lie each in a row of its own, or several in one: what takes
least work on a sample of batches is taken for all of them, in one shape or two, since
each one is compiled, which may take longer than many steps.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np

from jalign.data.batching import (
    Layout,
    PackedRow,
    assemble,
    bucket_length,
    first_that_holds,
    length_of,
    packed_parts,
    size_needed,
)
from jalign.data.examples import filler, side_lengths

logger = logging.getLogger("jalign.data")

Batch = TypeVar("Batch")
Collate = Callable[[Sequence[Any], int], Batch]

_ATTENTION = 4096  # row length at which attention is taken to cost what the rest does
_PAYS = 0.9  # of the work without packing: for less, rows are better kept apart
_WORTH = 0.95  # of the work with one shape: for less, a second one is not compiled


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
    return _order(n, batch_size, seed)(step)


def _order(n: int, batch_size: int, seed: int) -> Callable[[int], np.ndarray]:
    """`batch_indices` of a step."""
    import grain  # takes seconds to import

    if n < 1:
        raise ValueError("there are no examples to make batches of")
    endless = grain.MapDataset.range(n).seed(seed).shuffle()

    def indices(step: int) -> np.ndarray:
        places = range(step * batch_size, (step + 1) * batch_size)
        return np.array([endless[place] for place in places], np.int64)

    return indices


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
      max_length: longest padded length. Batches have one of two shapes at most, chosen
        from the lengths of all examples and the batch size, so that all hosts, and a
        run that goes on, agree on them (`choose_layout`).
      pack_rows: if not 0, put the examples of a batch behind each other in as few rows
        as hold them, where that saves work; rows of `pack` stay as they are. The number
        of parts that devices and micro-batches cut a global batch into: rows are a
        multiple of it. `collate` gets lists of examples then, or `PackedPairs`.
      shard_index, shard_count: this host and the number of hosts; a host gets a
        contiguous slice of batch_size / shard_count rows.
      start_step: the first step to yield.
      steps: end before this step; else after `epochs`; without both, never end.

    Raises: ValueError on no examples or a batch that does not divide over the hosts.
    """
    how = max_length, pack_rows, shard_index, shard_count
    make_batch = _batch_maker(examples, batch_size, collate, *how)
    indices = _order(len(examples), batch_size, seed)
    if steps is None and epochs is not None:
        steps = num_steps(len(examples), batch_size, epochs)
    if len(examples) < batch_size:
        logger.warning(
            "%d examples in batches of %d: examples repeat within a batch",
            len(examples),
            batch_size,
        )
    found = count(start_step) if steps is None else range(start_step, steps)
    return (make_batch(indices(step)) for step in found)


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

    All batches have one shape. The last one is filled up with rows without any segment,
    which count nothing. Arguments as in `make_loader`; examples in `balanced_order`
    need the fewest packed rows.
    """
    order = np.arange(len(examples))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    how = max_length, pack_rows, shard_index, shard_count
    return map(_batch_maker(examples, batch_size, collate, *how, batches), batches)


def _batch_maker(
    examples, batch_size, collate, max_length, pack_rows, host, hosts, batches=None
):
    """A function from the indices of a global batch's examples to this host's rows."""
    if not len(examples):
        raise ValueError("there are no examples to make batches of")
    if batch_size < 1 or batch_size % hosts:
        raise ValueError(
            f"batch_size={batch_size} cannot be divided over {hosts} processes"
        )
    if not 0 <= host < hosts:
        raise ValueError(f"shard_index={host} is not in [0, {hosts})")
    share = batch_size // hosts
    layout = choose_layout(examples, batch_size, max_length, pack_rows, hosts, batches)

    def make_batch(indices: np.ndarray):
        length = length_of(indices, layout)
        if layout.row_length:
            batch = assemble(packed_parts(indices, layout)[host], examples)
        else:
            batch = [examples[i] for i in indices]
            batch += [filler(batch[0])] * (batch_size - len(batch))
            batch = batch[host * share : (host + 1) * share]
        return collate(batch, length)

    return make_batch


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
    lengths = np.array([side_lengths(example) for example in examples])
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


def balanced_order(examples: Sequence[Any], size: int) -> np.ndarray:
    """Indices of all examples, so that each `size` in a row have about equal lengths.

    By length, every n-th of the n lots: so batches that may have any order fill equally
    many rows.
    """
    by_length = np.argsort([sum(side_lengths(x)) for x in examples], kind="stable")
    lots = -(-len(examples) // size)
    return np.concatenate([by_length[lot::lots] for lot in range(lots)])


def _with_sizes(
    layout: Layout, batch_size: int, batches: Sequence[np.ndarray], every: bool
) -> tuple[float, Layout]:
    """The layout with its sizes, and the work of the batches then."""
    needs = [size_needed(indices, layout) for indices in batches]
    work = partial(_work, layout, batch_size)
    largest = max(needs) if every else _holds_all(layout)
    sizes = (largest,) if every else choose_sizes(needs, largest, work)
    sized = layout._replace(sizes=sizes)
    mean = np.mean([work(first_that_holds(need, sized)) for need in needs])
    return float(mean), sized


def _holds_all(layout: Layout) -> int:
    """The size for any examples at all, whatever batches the run goes on to."""
    if not layout.row_length:
        return layout.limit
    # A row is opened where no other one has room, so all others have so many sides.
    in_each = layout.row_length // layout.limit
    most = -(-layout.places * layout.lengths.shape[1] // in_each)
    return -(-most // layout.quantum) * layout.quantum


def _work(layout: Layout, batch_size: int, size: int) -> float:
    """Padded tokens of a batch, with attention's share, in no particular unit."""
    rows, length = batch_size * layout.lengths.shape[1], size
    if layout.row_length:
        rows, length = size * layout.parts * layout.hosts, layout.row_length
    return rows * length * (1 + length / _ATTENTION)
