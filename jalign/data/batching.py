"""Examples to arrays: padding to few lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample
from jalign.data.packing import MAX_PACKED, PackedRow, join
from jalign.types import PreferenceBatch, TokenBatch


def bucket_length(length: int, max_length: int) -> int:
    """The padded length for `length` tokens: few values, so few compilations.

    16, 32, 64, 128, 256, then powers of two and the points a quarter, a half and three
    quarters of the way between them (320, 384, 448, 512, 640, ...), but never more
    than `max_length`.

    Raises: ValueError if `length` is more than `max_length`.
    """
    if length > max_length:
        raise ValueError(f"length {length} is more than max_length {max_length}")
    power = 16
    while power < length:
        power *= 2
    quarter = power // 8 if power > 256 else power
    bucket = -(-length // quarter) * quarter
    return min(bucket, max_length)


def collate_tokens(
    examples: Sequence[Example | PackedRow | Sequence[Example]], length: int
) -> TokenBatch:
    """Pads on the right. An example without tokens becomes a filler row.

    Args:
      examples: B documents, packed rows, or lists of documents to put behind each
        other, none longer than `length` in all.
      length: T.

    Returns: TokenBatch of int32 and bool arrays [B, T]; padding is 0 and False.
    """
    shape = (len(examples), length)
    batch = TokenBatch(
        tokens=np.zeros(shape, np.int32),
        completion_mask=np.zeros(shape, bool),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    for i, example in enumerate(examples):
        if isinstance(example, Example):
            row = PackedRow(*example, np.array(1), np.arange(len(example.tokens)))
        else:
            row = example if isinstance(example, PackedRow) else join(example)
        n = len(row.tokens)
        if n > length:
            raise ValueError(f"row of {n} tokens does not fit into {length}")
        for leaf, values in zip(batch, row, strict=True):
            leaf[i, :n] = values
    return batch


def collate_preferences(
    examples: Sequence[PreferenceExample | Sequence[PreferenceExample]],
    length: int,
    *,
    pairs_per_row: int | None = None,
) -> PreferenceBatch:
    """Both sides of the pairs; one without tokens, and room left over, are filler.

    Args:
      examples: B pairs, or B lists of up to `pairs_per_row` pairs for a row. Neither
        side of a row is longer than `length` in all.
      length: T.
      pairs_per_row: P; by default 1 for pairs and MAX_PACKED for lists of them.

    Returns: PreferenceBatch of [B, T] and float32 [B, P] arrays.
    Raises: ValueError if a row has too many pairs or tokens.
    """
    rows: list[Sequence[Any]] = [
        [row] if isinstance(row, PreferenceExample) else row for row in examples
    ]
    if pairs_per_row is None:
        single = all(isinstance(row, PreferenceExample) for row in examples)
        pairs_per_row = 1 if single else MAX_PACKED
    shape = (len(rows), pairs_per_row)
    margins, ref_chosen, ref_rejected = (np.zeros(shape, np.float32) for _ in range(3))
    for i, row in enumerate(rows):
        if len(row) > pairs_per_row:
            raise ValueError(f"{len(row)} pairs in a row, not {pairs_per_row}")
        for p, pair in enumerate(row):
            margins[i, p] = pair.margin
            ref_chosen[i, p] = pair.ref_chosen_logp
            ref_rejected[i, p] = pair.ref_rejected_logp
    chosen, rejected = (
        collate_tokens([[pair[side] for pair in row] for row in rows], length)
        for side in (0, 1)
    )
    return PreferenceBatch(chosen, rejected, margins, ref_chosen, ref_rejected)
