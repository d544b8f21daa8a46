"""The rows of a run, read as its flags say, and tokenized by all processes together."""

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from jalign import data, sharding
from jalign.data import wire
from jalign.data.sources import Source
from jalign.sharding import agreement
from jalign.train.config import DataOptions
from jalign.train.inputs import examples_digest, tokenizer_inputs

_log = logging.getLogger("jalign.train")
T = TypeVar("T")
# Rows of which one process has its share at a time: what a call of the tokenizer takes,
# and of all processes what is exchanged at once.
_SHARE, _BLOCK = 1024, 1 << 14
_WHAT = "tokenizing the rows"


def read_rows(source: Source, **how: Any) -> data.Rows:
    """`data.load_rows`, on every process or on none. Collective.

    Raises: as data.load_rows; OSError where another process cannot read them.
    """
    with agreement.together("reading the rows"):
        return data.load_rows(source, **how)


def examples_of(
    make: Callable[..., T], rows: Sequence[dict], tokenizer: Any, **how: Any
) -> T:
    """The examples of rows, which the processes template and tokenize by share.

    Collective: all processes have read all rows. Each encodes every n-th of them and
    has the others from the other processes, so that all have the examples, the counts
    and the errors of a single process that encodes all.

    Args:
      make: `data.sft_examples`, `data.preference_examples` or `data.prompt_examples`.
      rows, tokenizer, **how: its arguments.

    Returns: what `make` does.
    Raises: as `make`, on every process; ValueError where processes have other rows or
      another tokenizer; OSError where encoding fails on another process only.
    """
    if jax.process_count() == 1:
        return make(rows, tokenizer, **how)
    # What each makes of its share would else look like one data set.
    inputs = {"the rows": examples_digest([rows, getattr(rows, "bad", ())])}
    inputs |= tokenizer_inputs(tokenizer)
    sharding.agree("the rows or the tokenizer", inputs)
    with agreement.together(_WHAT):
        return make(rows, tokenizer, share=_by_share, **how)


def _by_share(
    encode: Callable[[list[Any]], Iterable[Any]], items: Sequence[Any]
) -> list[Any]:
    """The `data.rows.Share` of several processes."""
    index, count = jax.process_index(), jax.process_count()
    size, found = min(_SHARE * count, _BLOCK), []
    for start in range(0, len(items), size):
        block = list(items[start : start + size])
        with agreement.together(_WHAT):
            own = wire.to_bytes(list(encode(block[index::count])))
        for first, part in enumerate(agreement.gather_bytes(own)):
            block[first::count] = wire.from_bytes(part)
        found += block
    return found


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
    rows = read_rows(source, split=options.split, bad_rows=skip)
    if other is None and not options.eval_split:
        return rows, None
    split, name = options.eval_split or data.HELD_OUT, "eval_data"
    if other is None:
        other, name = source, "data"
    held_out = read_rows(other, split=split, bad_rows=skip, name=name)
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
