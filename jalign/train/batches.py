"""The batches of passes that only measure: held-out figures, reference log-probs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jalign import data, sharding


def measured_batches(
    mesh: Mesh | None,
    examples: Sequence[Any],
    *,
    collate: Callable[[Any, int], Any],
    batch_size: int,
    max_length: int,
) -> tuple[np.ndarray, Iterator[Any]]:
    """Every example once, in batches of one shape, packed where that saves work.

    Args:
      mesh: of the model.
      examples: all of them, the same on every process.
      collate, max_length: as in data.make_eval_loader.
      batch_size: examples of a batch, over all devices.

    Returns: the order in which the examples come, int64 [n], and this process's rows
      of the batches.
    """
    parts = sharding.batch_parts(mesh)
    index, count = sharding.process_slice(mesh)
    order = data.balanced_order(examples, -(-batch_size // parts))
    batches = data.make_eval_loader(
        [examples[i] for i in order],
        batch_size=batch_size,
        collate=collate,
        max_length=max_length,
        pack_rows=parts,
        shard_index=index,
        shard_count=count,
    )
    return order, batches
