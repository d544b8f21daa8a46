"""The few shapes of an online run, known before its first rollout, and how batches of
them reach the mesh."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jalign import data, sharding
from jalign.data.batching import round_up
from jalign.data.loader import choose_sizes, sample_batches
from jalign.generate.inputs import bucket_length
from jalign.train.online_config import OnlineConfig
from jalign.types import PyTree, Rollout


class Shapes(NamedTuple):
    """How long prompts and rows are, whichever of the prompts are drawn.

    Both are ascending, of one length or two; the last one holds all.

    Attributes:
      prompt_lengths: tokens that prompts are padded to, to sample.
      row_lengths: of prompt and completion. Passes take the last one, and a training
        step the first one that holds its rows.
    """

    prompt_lengths: tuple[int, ...]
    row_lengths: tuple[int, ...]


def longest_shapes(config: OnlineConfig) -> Shapes:
    """For any prompts that the config lets in."""
    new = config.options.sampling.max_new_tokens
    return Shapes((config.max_length - new,), (config.max_length,))


def choose_shapes(
    prompts: Sequence[data.PromptExample],
    held_out: Sequence[data.PromptExample],
    config: OnlineConfig,
    multiple: int = 1,
) -> Shapes:
    """For these prompts; the shorter lengths are those that save most work.

    They are chosen as if no completion stopped early. Those of rows are multiples of
    `multiple`.
    """
    new, rows = config.options.sampling.max_new_tokens, config.completions
    lengths = np.array([len(p.tokens) for p in prompts])
    drawn = lengths[sample_batches(len(prompts), config.batch_size)].max(axis=1)
    longest = max(len(p.tokens) for p in [*prompts, *held_out])

    def row_length(prompt_length: int) -> int:
        bucket = data.bucket_length(prompt_length + new, config.max_length)
        return round_up(bucket, multiple)

    def sampled(number: int, length: int) -> float:
        """Tokens that go through the model for so many prompts."""
        return float(number * length + rows * new)

    def sampling(length: int) -> float:
        return sampled(rows if length == widest else config.batch_size, length)

    widest = bucket_length(longest)
    alone = sampled(config.batch_size, widest)
    needs = [bucket_length(int(n)) for n in drawn]
    return Shapes(
        choose_sizes(needs, widest, sampling, alone),
        choose_sizes([row_length(int(n)) for n in drawn], row_length(longest), float),
    )


def local_rows(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """A batch that every process holds whole -> global arrays over the mesh."""
    index, count = sharding.process_slice(mesh)

    def mine(x):
        share = len(x) // count
        return x[index * share : (index + 1) * share]

    return sharding.put_batch(jax.tree.map(mine, batch), mesh)


def in_pieces(
    function: Callable[[PyTree], PyTree], batch: PyTree, *, rows: int, mesh: Mesh | None
) -> PyTree:
    """function(batch), `rows` rows at a time: one compilation and bounded memory.

    Args:
      function: from a batch on the mesh to arrays [rows, ...].
      batch: host arrays [B, ...]; filled up with zeros to a multiple of `rows`.
      rows: of each piece.
      mesh: where the pieces go.

    Returns: host arrays [B, ...].
    """
    size = len(jax.tree.leaves(batch)[0])
    missing = -size % rows

    def fill(x):
        return np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])

    filled = jax.tree.map(fill, batch)
    pieces = []
    for start in range(0, size, rows):
        piece = jax.tree.map(lambda x, at=start: x[at : at + rows], filled)
        pieces.append(sharding.gather(function(local_rows(piece, mesh))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:size], *pieces)


def cut(rollout: Rollout, row_lengths: Sequence[int]) -> Rollout:
    """Without the last columns, as many as none of its rows needs.

    Args:
      rollout: host arrays [B, T].
      row_lengths: ascending, the last one T.
    """
    used = np.asarray(rollout.segment_ids > 0).any(axis=0)
    longest = int(np.flatnonzero(used).max(initial=0)) + 1
    length = next(n for n in row_lengths if n >= longest)
    return jax.tree.map(lambda x: x[:, :length], rollout)


def minibatches(
    rollout: Rollout,
    config: OnlineConfig,
    iteration: int,
    row_lengths: Sequence[int] = (),
) -> Iterator[Rollout]:
    """num_epochs passes over a rollout in num_minibatches parts, anew shuffled, each
    cut to the first of the row lengths that holds it."""
    lengths = row_lengths or rollout.tokens.shape[1:]
    for epoch in range(config.options.num_epochs):
        random = np.random.default_rng([config.seed, iteration, epoch])
        order = random.permutation(config.completions)
        for part in np.split(order, config.options.num_minibatches):
            yield cut(jax.tree.map(lambda x, part=part: x[part], rollout), lengths)
