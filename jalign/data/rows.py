"""Rows that remember where they came from, and one report for the bad ones."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

Share = Callable[[Callable[[list[Any]], Iterable[Any]], Sequence[Any]], list[Any]]
"""(encode, items) -> what `encode`, a function of a list, makes of each item: where
several processes have the same items, each may call it with some of them. What it makes
is in the form that `wire` describes."""

BAD_ROWS_MODES = ("error", "skip")


class Row(dict):
    """A dict with `origin`, e.g. "train.jsonl row 7", for messages.

    A row of a line-based file is numbered by its line, blank lines included.
    """

    __slots__ = ("origin",)

    def __init__(self, fields: dict[str, Any], origin: str):
        super().__init__(fields)
        self.origin = origin


class BadRow(NamedTuple):
    """One unusable row: where it is, which field, and why."""

    origin: str
    field: str
    reason: str


class RowError(ValueError):
    """Raised on one row, by code that does not know where the row came from."""

    def __init__(self, field: str, reason: str):
        super().__init__(f"field '{field}': {reason}")
        self.field = field
        self.reason = reason


class Rows(list):
    """A list of `Row`; `bad` holds those that could not even be read."""

    def __init__(self, rows: Iterable[Row] = (), bad: Iterable[BadRow] = ()):
        super().__init__(rows)
        self.bad = tuple(bad)


def parse_rows(rows: Sequence[dict], parse: Callable[[dict], T]) -> list[T | RowError]:
    """What every row is, parsed on its own, or what is wrong with it.

    Formats are never guessed from the first row: a mixed data set is either read
    right or reported.
    """

    def parse_row(row: Any) -> T:
        if not isinstance(row, dict):
            raise RowError("(row)", f"is {type(row).__name__}, not an object")
        return parse(row)

    return [attempt(parse_row, row) for row in rows]


def attempt(function: Callable[..., T], *args: Any) -> T | RowError:
    """What the function gives, or the RowError that it raises."""
    try:
        return function(*args)
    except RowError as error:
        return error


def alone(encode: Callable[[list[Any]], Iterable[Any]], items: Sequence[Any]) -> list:
    """The `Share` of a single process: all of it, in one call."""
    return list(encode(list(items)))


def is_good(item: Any) -> bool:
    return not isinstance(item, RowError)


def encode_some(
    items: Sequence[Any],
    encode: Callable[[list[Any]], Iterable[Any]],
    which: Callable[[Any], bool] = is_good,
) -> list[Any]:
    """The items, with some of them (all that are no RowError) encoded in one call."""
    chosen = [which(item) for item in items]
    found = iter(encode(list(itertools.compress(items, chosen))))
    return [next(found) if here else x for x, here in zip(items, chosen, strict=True)]


def sort_out(rows: Sequence[dict], items: Sequence[Any]) -> tuple[list, list[BadRow]]:
    """The items of rows that are good, and the rows that could not be used or read."""
    bad: list[BadRow] = list(getattr(rows, "bad", ()))
    for number, (row, item) in enumerate(zip(rows, items, strict=True), 1):
        if isinstance(item, RowError):
            origin = getattr(row, "origin", f"row {number}")
            bad.append(BadRow(origin, item.field, item.reason))
    return [item for item in items if is_good(item)], bad


def total_rows(rows: Sequence[dict]) -> int:
    """Rows of the source, those that could not be read included."""
    return len(rows) + len(getattr(rows, "bad", ()))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


parse_json = json.JSONDecoder(object_pairs_hook=_object).decode
"""A JSON text to a value. Raises ValueError, also for a key that an object has twice:
`json.loads` would keep the last one without a word."""


def check_bad_rows_mode(bad_rows: str) -> None:
    if bad_rows not in BAD_ROWS_MODES:
        raise ValueError(f"bad_rows must be 'error' or 'skip', not {bad_rows!r}")


def settle(bad: Sequence[BadRow], total: int, bad_rows: str) -> dict[str, int]:
    """Raises on bad rows, or counts them when `bad_rows` is "skip".

    Returns: {"bad_rows": how many, "bad_rows/FIELD: REASON": how many, ...}.
    Raises: ValueError naming the first rows, their fields and all reasons.
    """
    check_bad_rows_mode(bad_rows)
    if total == 0:
        raise ValueError("there are no rows in the data")
    # Indices and columns are dropped here: one kind of fault, one count.
    reasons = Counter(re.sub(r"\d+", "N", f"{r.field}: {r.reason}") for r in bad)
    if bad and (bad_rows == "error" or len(bad) == total):
        raise ValueError(_report(bad, total, reasons))
    counts = {f"bad_rows/{reason}": n for reason, n in reasons.items()}
    return {"bad_rows": len(bad), **counts}


def _report(bad: Sequence[BadRow], total: int, reasons: Counter[str]) -> str:
    firsts = "; ".join(f"{r.origin}, field '{r.field}': {r.reason}" for r in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    kinds = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
    advice = (
        "No row is usable."
        if len(bad) == total
        else "Mend them, or pass bad_rows='skip' (--bad-rows skip)."
    )
    return (
        f"{len(bad)} of {total} rows are unusable ({kinds}). {firsts}{more}. {advice}"
    )
