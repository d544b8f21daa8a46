"""`--columns`: other names for the columns of a data set."""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jalign.data.row_layouts import (
    ANSWERS,
    BESIDE,
    KNOWN_COLUMNS,
    PAIRS,
    Layout,
    has_pair,
    prompt_layout,
    split_columns,
)
from jalign.data.rows import RowError, parse_rows

logger = logging.getLogger("jalign.data")
T = TypeVar("T")

Columns = str | Mapping[str, str | Sequence[str]] | None
IGNORE = "ignore"
PLAIN = {"prompt", "completion", "chosen", "rejected", "messages", "text", "margin"}
"""Columns of which it need not be said that they are read."""


def parse_by_columns(
    rows: Sequence[dict],
    parse: Callable[[dict], T],
    layout_of: Callable[[dict], Layout] | None,
    columns: Columns,
) -> list[T | RowError]:
    """The record of each row, or what is wrong with it.

    Says once which columns are read and which are not.

    Args:
      rows: as they were read.
      parse: a row under its known names -> a record; may raise RowError.
      layout_of: the same row -> which of its columns `parse` reads; None checks and
        says nothing: for a few rows of a data set that is read as a whole as well.
      columns: as in `parse_columns`.

    Raises: ValueError for columns that are not there, or not read.
    """
    names = parse_columns(columns)
    if layout_of:
        check_columns(names, rows)
    renamed = (rename(row, names) for row in rows if isinstance(row, dict))
    read, unread = split_columns(renamed, layout_of) if layout_of else ([], [])
    # An answer is left to the reward functions where only prompts are read.
    answers = {*ANSWERS, *sum(PAIRS, ())} if layout_of is prompt_layout else set()
    for name in sorted((names.keys() & set(unread)) - answers):
        _refuse_unread(name, read, names)
    if unread or not PLAIN.issuperset(read):
        shown = [", ".join(map(str, found)) or "none" for found in (read, unread)]
        logger.info("columns read: %s; not read: %s", *shown)
    return parse_rows(rows, lambda row: parse(rename(row, names)))


def _refuse_unread(name: str, read: list[str], names: Mapping[str, Any]) -> None:
    """Raises ValueError that names the columns which go before one given by name."""
    ahead = [other for other in read if other not in BESIDE]
    if not ahead:
        return  # no row can be read, which is said of the rows
    shown = [f"{n} ({names[n][0]!r})" if n in names else repr(n) for n in ahead]
    drop = next((other for other in ahead if other not in names), None)
    advice = f"leave {drop!r} out by {IGNORE}={drop}" if drop else "name only one"
    raise ValueError(
        f"columns: {name!r} is not read, as the rows are read by {', '.join(shown)}: "
        f"{advice}, or leave {name}={names[name][0]} out"
    )


def parse_columns(columns: Columns) -> dict[str, tuple[str, ...]]:
    """{a known name: the columns of the data that are meant}.

    Args:
      columns: "prompt=question,completion=answer", or a mapping of the same. Each
        known name takes one column; "ignore" takes any number ("ignore=label").

    Raises: ValueError naming what is not known, with the nearest.
    """
    if isinstance(columns, str):
        pairs = [part.partition("=") for part in columns.split(",") if part.strip()]
    else:
        pairs = [
            (target, "=", source)
            for target, value in (columns or {}).items()
            for source in ([value] if isinstance(value, str) else value)
        ]
    found: dict[str, tuple[str, ...]] = {}
    for target, _, source in pairs:
        target, source = target.strip(), source.strip()
        if not target or not source:
            raise ValueError(
                f"columns {columns!r}: expected NAME=COLUMN, with commas between"
            )
        if target not in KNOWN_COLUMNS and target != IGNORE:
            known = [*KNOWN_COLUMNS, IGNORE]
            raise ValueError(f"columns: nothing reads {target!r}{near(target, known)}")
        if target in found and target != IGNORE:
            raise ValueError(f"columns: {target!r} is given twice")
        found[target] = (*found.get(target, ()), source)
    return found


def check_columns(columns: Mapping[str, Sequence[str]], rows: Iterable[dict]) -> None:
    """Raises ValueError for a column that no row has, with the nearest that one has."""
    wanted = {source for sources in columns.values() for source in sources}
    if not wanted:
        return
    present: dict[str, None] = {}
    for row in rows:
        if isinstance(row, dict):
            present.update(dict.fromkeys(map(str, row)))
    for source in sorted(wanted - present.keys()):
        listed = ", ".join(present) or "none"
        raise ValueError(
            f"columns: no row has {source!r}{near(source, present)} (of {listed})"
        )


def are_pairs(rows: Sequence[dict], columns: Columns = None) -> bool:
    """Whether the first row holds two answers to compare, not one."""
    names = parse_columns(columns)
    return bool(rows) and has_pair(rename(rows[0], names))


def rename(row: dict[str, Any], columns: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The row as if its columns were called so; those renamed over are left out."""
    if not columns:
        return row
    sources = {source for names in columns.values() for source in names}
    kept = {k: v for k, v in row.items() if k not in sources and k not in columns}
    named = {k: row[v[0]] for k, v in columns.items() if k != IGNORE and v[0] in row}
    return kept | named


def near(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name, or nothing."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
