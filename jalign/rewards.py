"""Reward functions: from a Python file of the user's, or from a reward checkpoint.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, and gives B numbers. Whatever it gives is checked here once, so that no
string, NaN or missing row gets as far as the optimizer.
"""

import difflib
import importlib.util
import math
import numbers
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jalign import data, sharding
from jalign.data.tokenizer import encode_pairs
from jalign.models import Model
from jalign.types import PyTree

RewardFn = Callable[[list[str], list[str], list[dict[str, Any]]], np.ndarray]
"""(prompts, completions, rows), each a list of B -> float32 [B]."""

Tokens = Sequence[int] | np.ndarray

__all__ = ["RewardFn", "checked", "load_reward", "model_reward", "score_tokens"]


def load_reward(spec: str, *, timeout: float | None = 600.0) -> RewardFn:
    """The function that "path/to/file.py:function" names, with its results checked.

    The file is run, as `python file.py` would run it (but for its __main__ part).

    Args:
      spec: file and function.
      timeout: seconds after which a call counts as hanging; None waits for ever.

    Raises: ValueError if spec is no "file.py:function", the file cannot be run or has
      no such function; FileNotFoundError if there is no such file.
    """
    path, _, name = spec.rpartition(":")
    if not path or not name.isidentifier():
        raise ValueError(f"reward {spec!r} is not FILE.py:FUNCTION")
    module = _run_file(Path(path))
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and k[0] != "_"]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(known)}"
        raise ValueError(f"reward {spec!r}: {path} has no function {name}; {hint}")
    return checked(function, name=spec, timeout=timeout)


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"reward: there is no file {path}")
    # A name of its own, so that a reward called `json.py` hides no real module.
    spec = importlib.util.spec_from_file_location(f"_jalign_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"reward: {path} cannot be run: {type(error).__name__}: {error}"
        ) from error
    return module


def checked(
    function: Callable, *, name: str = "reward", timeout: float | None = None
) -> RewardFn:
    """Wraps a function so that every result is float32 [B], finite, and on time.

    Args:
      function: (prompts, completions, rows) -> B numbers (list, NumPy or JAX array).
      name: what to call it in messages.
      timeout: seconds, or None.

    Returns: a RewardFn that raises ValueError naming the row if a reward is not a
      finite number, if there are not B, or if the function raises; TimeoutError if it
      takes too long.
    """

    def reward(prompts, completions, rows):
        batch = [list(prompts), list(completions), list(rows)]
        if len({len(part) for part in batch}) != 1:
            raise ValueError(f"reward {name}: lists of {[len(p) for p in batch]} rows")
        try:
            values = _call(partial(function, *batch), name, timeout)
        except Exception as error:
            if isinstance(error, _Late):
                raise TimeoutError(str(error)) from None
            where = _failing_row(function, batch, name, timeout)
            raise ValueError(
                f"reward {name} raised {type(error).__name__}: {error} {where}"
            ) from error
        return _as_rewards(values, batch, name)

    return reward


class _Late(Exception):
    """The reward function did not come back."""


def _call(function: Callable[[], Any], name: str, timeout: float | None) -> Any:
    """function(), in a thread of its own that is given up after `timeout` seconds."""
    if timeout is None:
        return function()
    outcome: list[Any] = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=f"reward {name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        raise _Late(f"reward {name} did not return within {timeout:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


def _failing_row(function, batch, name, timeout) -> str:
    """Which row the function fails on when it is given alone, for the message."""
    size = len(batch[0])
    for row in range(size):
        try:
            _call(partial(function, *([p[row]] for p in batch)), name, timeout)
        except Exception:
            return f"(row {row} of {size}: {_excerpt(batch, row)})"
    return f"(on a batch of {size} rows; on none of them alone)"


def _excerpt(batch, row: int) -> str:
    prompt, completion = (str(part[row])[-60:] for part in batch[:2])
    return f"prompt …{prompt!r}, completion …{completion!r}"


def _as_rewards(values: Any, batch, name: str) -> np.ndarray:
    """B numbers of any kind -> float32 [B], or an error that names the row."""
    size = len(batch[0])
    if isinstance(values, str | dict) or not hasattr(values, "__len__"):
        raise ValueError(
            f"reward {name} gave a {type(values).__name__}, not {size} numbers"
        )
    if hasattr(values, "tolist"):  # NumPy, JAX and torch arrays
        values = values.tolist()
    if len(values) != size:
        raise ValueError(f"reward {name} gave {len(values)} rewards for {size} rows")
    for row, value in enumerate(values):
        if hasattr(value, "item") and getattr(value, "size", 1) == 1:
            value = values[row] = value.item()
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(
                f"reward {name} gave {value!r} for row {row}, not a finite number "
                f"({_excerpt(batch, row)})"
            )
    return np.asarray(values, np.float32)


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
