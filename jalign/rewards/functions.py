"""Reward functions from a Python file of the user's, with their results checked.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, and gives B numbers. Whatever it gives is checked here once, so that no
string, NaN or missing row gets as far as the optimizer.
"""

import difflib
import importlib.util
import math
import numbers
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jalign.rewards.samples import RewardFn


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
