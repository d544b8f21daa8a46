"""Reward functions from a Python file of the user's, with their results checked.

A reward function takes prompts, completions and the data rows they came from, each a
list of B, or the columns of TRL's form (samples.py), and gives B numbers. Whatever it
gives is checked here once, so that no string, NaN or missing row gets as far as the
optimizer.
"""

import asyncio
import contextlib
import copy
import difflib
import functools
import importlib.util
import inspect
import numbers
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jalign.paths import located, on_disk
from jalign.rewards.samples import (
    RewardFn,
    Samples,
    column_arguments,
    columns_batch,
    takes_columns,
)

TIMEOUT = 600.0
"""Seconds that a call of a reward function may take, where nothing else is said."""


def load_function(spec: str, *, timeout: float | None = TIMEOUT) -> RewardFn:
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
    file = located(path)
    if not file.is_file():
        raise FileNotFoundError(f"reward: there is no file {path}")
    with on_disk(file) as here:
        module = _run_file(here, path)
    function = getattr(module, name, None)
    if not callable(function):
        known = [k for k, v in vars(module).items() if callable(v) and k[0] != "_"]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(known)}"
        raise ValueError(f"reward {spec!r}: {path} has no function {name}; {hint}")
    return checked(function, name=spec, timeout=timeout)


def _run_file(path: Path, name: str) -> ModuleType:
    # A name of its own, so that a reward called `json.py` hides no real module.
    spec = importlib.util.spec_from_file_location(f"_jalign_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"reward: {name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: it would end the run with 0
        raise ValueError(
            f"reward: {name} cannot be run: {type(error).__name__}: {error}"
        ) from error
    return module


def checked(
    function: Callable, *, name: str = "reward", timeout: float | None = None
) -> RewardFn:
    """Wraps a function so that every result is float32 [B], finite, and on time.

    The function gets copies: what it does to its lists and rows stays its own.

    Args:
      function: of jalign's form or TRL's (`takes_columns` tells them apart by the
        signature) -> B real numbers (list, tuple, NumPy or JAX array), or a coroutine
        of them; True and False are 1 and 0. In TRL's form None says that the function
        does not judge a row.
      name: what to call it in messages.
      timeout: seconds, or None.

    Returns: a RewardFn, NaN where a function of TRL's form gave None. It raises
      ValueError naming the row if a reward is not a finite float32, if there are not B,
      or if the function raises (SystemExit, too); TimeoutError if it takes too long.
    Raises: ValueError for a signature of neither form.
    """
    if timeout is not None and not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"reward {name}: timeout must be > 0 seconds, got {timeout}")
    by_columns = takes_columns(function, name)

    def of_columns(*batch):
        return function(**column_arguments(function, name, *batch))

    def reward(prompts, completions, rows, *, samples: Samples | None = None):
        batch = [list(prompts), list(completions), list(rows)]
        if len({len(part) for part in batch}) != 1:
            raise ValueError(f"reward {name}: lists of {[len(p) for p in batch]} rows")
        if not by_columns:
            return judged(function, batch)
        batch = columns_batch(*batch, samples=samples)
        column_arguments(function, name, *batch)  # a fault of the data's, said as such
        return judged(of_columns, batch)

    def judged(function, batch):
        values, error = _call(function, batch, timeout)
        if isinstance(error, _Late):
            raise TimeoutError(
                f"reward {name} did not return within {timeout:g} s for "
                f"{len(batch[0])} rows (--reward-timeout)"
            )
        if error is not None:
            where = _failing_row(function, batch, timeout)
            raise ValueError(
                f"reward {name} raised {type(error).__name__}: {error} {where}"
            ) from error
        return _as_rewards(values, batch, name, may_pass=by_columns)

    return reward


class _Late(Exception):
    """The reward function did not come back."""


def _call(
    function: Callable, batch: list[list], timeout: float | None
) -> tuple[Any, BaseException | None]:
    """What function(*batch) gives on copies, or else what it raises, of whatever kind.

    With a timeout in a thread, which is given up after so many seconds: `_Late`.
    Without one Ctrl-C is not the function's own.
    """
    ask = functools.partial(_settled, function, copy.deepcopy(batch))
    outcome: list[tuple[Any, BaseException | None]] = []

    def run():
        try:
            outcome.append((ask(), None))
        except BaseException as error:
            if timeout is None and isinstance(error, KeyboardInterrupt):
                raise
            outcome.append((None, error))

    if timeout is None:
        run()
    else:
        # A daemon, for one that never ends must not keep the process.
        thread = threading.Thread(target=run, name="reward", daemon=True)
        thread.start()
        thread.join(timeout)
    return outcome[0] if outcome else (None, _Late())


def _settled(function: Callable, arguments: list[list]) -> Any:
    """function(*arguments), awaited where it is a coroutine."""
    values = function(*arguments)
    return asyncio.run(values) if inspect.iscoroutine(values) else values


def _failing_row(function, batch, timeout) -> str:
    """Which row the function fails on when it is given alone, for the message."""
    size, start = len(batch[0]), time.monotonic()
    for row in range(size):
        left = None if timeout is None else timeout - (time.monotonic() - start)
        if left is not None and left <= 0:
            break
        alone = [part[row : row + 1] for part in batch]
        if _call(function, alone, left)[1] is not None:
            return f"(row {row} of {size}: {_excerpt(batch, row)})"
    return f"(on a batch of {size} rows; on none of them alone)"


def _excerpt(batch, row: int) -> str:
    prompt, completion = (str(part[row])[-60:] for part in batch[:2])
    return f"prompt …{prompt!r}, completion …{completion!r}"


def _as_rewards(values: Any, batch, name: str, *, may_pass: bool) -> np.ndarray:
    """B numbers of any kind -> float32 [B], or an error that names the row.

    With may_pass None is NaN: a row that the function does not judge.
    """
    size = len(batch[0])
    given = values
    if hasattr(values, "tolist"):  # NumPy, JAX and torch arrays, pandas
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise ValueError(
            f"reward {name} gave a {type(given).__name__}, not {size} numbers"
        )
    if len(values) != size:
        raise ValueError(f"reward {name} gave {len(values)} rewards for {size} rows")
    return np.array(
        [
            np.float32(np.nan)
            if may_pass and value is None
            else _as_reward(value, row, batch, name)
            for row, value in enumerate(values)
        ],
        np.float32,
    )


def _as_reward(value: Any, row: int, batch, name: str) -> np.float32:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    reward = np.float32(np.nan)
    if isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError), np.errstate(over="ignore"):
            reward = np.float32(value)  # 1e300 is infinite here
    if not np.isfinite(reward):
        raise ValueError(
            f"reward {name} gave {repr(value)[:60]} for row {row}, not a finite "
            f"float32 ({_excerpt(batch, row)})"
        )
    return reward
