"""Rewards from a reward checkpoint: the score at the last token of each text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import data, sharding
from jalign.data.tokenizer import encode_pairs
from jalign.models import Model
from jalign.rewards.functions import RewardFn
from jalign.types import PyTree

Tokens = Sequence[int] | np.ndarray


def model_reward(
    model: Model,
    params: PyTree,
    tokenizer: Any,
    *,
    max_length: int = 2048,
    batch_size: int = 64,
) -> RewardFn:
    """Scores prompt + completion + EOS by a reward model, as it was trained on them.

    A text longer than max_length keeps its start, as in training. Where policy and
    reward model share a tokenizer, `score_tokens` on the sampled ids saves the way
    through text.

    Args:
      model: a model with num_labels=1.
      params: its parameters.
      tokenizer: the reward model's own.
      max_length: tokens.
      batch_size: rows scored at once (global).
    """

    def reward(prompts, completions, rows):
        del rows
        pairs = list(zip(prompts, completions, strict=True))
        encoded = encode_pairs(tokenizer, pairs)
        sequences = [ids[:max_length] for ids, _ in encoded]
        return score_tokens(model, params, sequences, batch_size=batch_size)

    return reward


def score_tokens(
    model: Model,
    params: PyTree,
    sequences: Sequence[Tokens],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    """The reward model's score at the last token of each sequence.

    Every process passes the same sequences and gets all the scores.

    Args:
      model: a model with num_labels=1.
      params: its parameters.
      sequences: B token sequences, each with at least one token.
      batch_size: rows scored at once (global).

    Returns: float32 [B] NumPy.
    Raises: ValueError for a model without a score head, an empty sequence, or a score
      that is not finite, naming the row.
    """
    if model.config.num_labels != 1:
        raise ValueError("score_tokens needs a reward model (num_labels=1)")
    empty = [row for row, tokens in enumerate(sequences) if not len(tokens)]
    if empty:
        raise ValueError(f"sequence {empty[0]} has no tokens to score")
    parts = [
        sharding.gather(_score(params, *_pad(part, batch_size), model=model))
        for part in _parts(sequences, batch_size)
    ]
    scores = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    scores = scores[: len(sequences)]
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(f"the reward model gave {scores[bad[0]]} for row {bad[0]}")
    return scores


def _parts(sequences: Sequence, size: int):
    return (sequences[i : i + size] for i in range(0, len(sequences), size))


def _pad(sequences: Sequence[Tokens], rows: int):
    """Tokens int32 [rows, T] and lengths int32 [rows], of few different shapes."""
    lengths = np.ones(rows, np.int32)
    lengths[: len(sequences)] = [len(tokens) for tokens in sequences]
    longest = int(lengths.max())
    width = data.bucket_length(longest, 1 << 30)
    tokens = np.zeros((rows, width), np.int32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return tokens, lengths


@partial(jax.jit, static_argnames="model")
def _score(params, tokens, lengths, *, model):
    tokens = sharding.constrain(tokens, model.mesh, "batch", None)
    hidden, _ = model.apply(params, tokens)
    scores = model.score(params, hidden)
    return jnp.take_along_axis(scores, (lengths - 1)[:, None], axis=1)[:, 0]
