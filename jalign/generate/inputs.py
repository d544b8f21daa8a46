"""What `generate` is given: checked, padded to few shapes, placed on a mesh."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from jalign import sharding
from jalign.types import PyTree

Tokens = Sequence[int] | np.ndarray


def check_settings(
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    group_size: int = 1,
) -> None:
    """Raises ValueError naming the sampling setting that is out of range."""
    counts = dict(max_new_tokens=max_new_tokens, group_size=group_size)
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature must be 0 (greedy) or positive, not {temperature}"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], where 1 is off, not {top_p}")


def check_tokens(name: str, tokens: Tokens, vocab_size: int) -> None:
    """Raises ValueError naming a token that the model does not embed."""
    for token in (min(tokens), max(tokens)) if len(tokens) else ():
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}: token {token} is not in the model's vocabulary of "
                f"{vocab_size}"
            )


def check_prompts(prompts: Sequence[Tokens], config, max_new_tokens: int) -> None:
    """Raises ValueError naming a row that is empty, too long or out of vocabulary."""
    if not len(prompts):
        raise ValueError("there are no prompts")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} has no tokens; start it with BOS at least")
        check_tokens(f"prompt {row}", prompt, config.vocab_size)
        length = len(prompt) + max_new_tokens
        if length > config.max_position:
            raise ValueError(
                f"prompt {row} of {len(prompt)} tokens and max_new_tokens="
                f"{max_new_tokens} make {length} tokens; the model's context is "
                f"{config.max_position}"
            )


def bucket_length(length: int) -> int:
    """The padded length: 16, 24, 32, 48, 64, 96, … so that few shapes compile."""
    bucket = 16
    while bucket < length:
        # From a power of two to one and a half of it, and on to the next power.
        bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
    return bucket


def pad_prompts(
    prompts: Sequence[Tokens], total: int, longest: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts on the left of int32 [total, P], and lengths int32 [total].

    P is the bucket of the longest one, or of `longest` if that is more. Filler rows
    behind them hold one token.
    """
    lengths = np.ones(total, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    width = bucket_length(max(longest, int(lengths.max())))
    tokens = np.zeros((total, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def place(tree: PyTree, mesh) -> PyTree:
    """NumPy arrays that every process has -> arrays cut over the mesh by rows."""
    if mesh is None:
        return tree
    rows = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, rows, lambda i: x[i]), tree
    )
