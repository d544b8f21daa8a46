"""The rows of a run, read as its flags say."""

import logging
import operator
from pathlib import Path

from jalign import data
from jalign.data.sources import Source
from jalign.train.config import DataOptions

_log = logging.getLogger("jalign.train")


def load_run_rows(
    source: Source, options: DataOptions
) -> tuple[data.Rows, data.Rows | None]:
    """(training rows, held-out rows or None); warns where both share rows.

    Args:
      source: the run's `data`.
      options: the run's config.

    Raises: as data.load_rows.
    """
    skip, other = options.bad_rows, options.eval_data
    rows = data.load_rows(source, split=options.split, bad_rows=skip)
    if other is None and not options.eval_split:
        return rows, None
    split, name = options.eval_split or data.HELD_OUT, "eval_data"
    if other is None:
        other, name = source, "data"
    held_out = data.load_rows(other, split=split, bad_rows=skip, name=name)
    in_memory = not all(isinstance(given, str | Path) for given in (source, other))
    # A row in memory has no place of its own: there equal rows are the same.
    mark = repr if in_memory else operator.attrgetter("origin")
    seen = set(map(mark, rows))
    shared = [row.origin for row in held_out if mark(row) in seen]
    if shared:
        _log.warning(
            "%d of %d held-out rows are training rows (%s ...): give --eval-data or "
            "--eval-split of others",
            len(shared),
            len(held_out),
            min(shared),
        )
    return rows, held_out
