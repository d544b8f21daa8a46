"""Batches in an order that is a function of (seed, epoch, index) and nothing else.

The rows of all epochs stand in one endless sequence, each epoch shuffled anew, and
step s takes rows s*B to (s+1)*B of it. So there is no iterator state: a run resumes
at a step, on any number of hosts, with the batches it would have had.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from jalign.data.examples import filler
from jalign.data.layout import (
    Layout,
    assemble,
    choose_layout,
    length_of,
    packed_parts,
)

logger = logging.getLogger("jalign.data")

Batch = TypeVar("Batch")
Collate = Callable[[Sequence[Any], int], Batch]


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
      max_length: longest padded length. Batches have one of two shapes at most, chosen
        from the lengths of all examples and the batch size, so that all hosts, and a
        run that goes on, agree on them (`layout.choose_layout`).
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
    mine = _host_rows(len(examples), batch_size, shard_index, shard_count)
    order = _order(len(examples), seed)

    def indices(step: int) -> np.ndarray:
        places = range(step * batch_size, (step + 1) * batch_size)
        return np.array([order[place] for place in places])

    how = max_length, pack_rows, shard_count
    layout = choose_layout(examples, batch_size, *how)
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

    All batches have one shape. The last one is filled up with rows without any segment,
    which count nothing. Arguments as in `make_loader`; examples in `balanced_order`
    need the fewest packed rows.
    """
    mine = _host_rows(len(examples), batch_size, shard_index, shard_count)
    starts = range(0, len(examples), batch_size)
    batches = [np.arange(len(examples))[start : start + batch_size] for start in starts]
    how = max_length, pack_rows, shard_count
    layout = choose_layout(examples, batch_size, *how, batches)
    return map(_batch_maker(examples, batch_size, collate, layout, mine), batches)


def _batch_maker(examples, batch_size, collate, layout: Layout, mine: slice):
    """A function from the indices of a global batch's examples to this host's rows."""

    def make_batch(indices: np.ndarray):
        length = length_of(indices, layout)
        if layout.row_length:
            host = mine.start // (mine.stop - mine.start)
            parts = packed_parts(indices, layout)[host]
            batch = assemble(parts, examples)
        else:
            batch = [examples[i] for i in indices]
            batch += [filler(batch[0])] * (batch_size - len(batch))
            batch = batch[mine]
        return collate(batch, length)

    return make_batch


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
