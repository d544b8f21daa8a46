"""Examples to arrays: padding to few lengths."""

from collections.abc import Sequence

import numpy as np

from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample
from jalign.data.packing import PackedPairs, PackedRow, join
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
    examples: Sequence[PreferenceExample | PackedPairs], length: int
) -> PreferenceBatch:
    """Both sides of the pairs; pairs without tokens, and room left over, are filler.

    Args:
      examples: B pairs, which get two rows each, or B parts of packed pairs, with
        equally many pairs and rows. No row is longer than `length` in all.
      length: T.

    Returns: PreferenceBatch of [B, R, T] and float32 [B, P] arrays.
    Raises: ValueError if the parts differ or a row has too many tokens.
    """
    parts = [
        x if isinstance(x, PackedPairs) else PackedPairs([x], [[0], [1]])
        for x in examples
    ]
    shapes = {(len(part.rows), len(part.pairs)) for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"parts of different numbers of (rows, pairs): {shapes}")
    shape = len(parts), *shapes.pop(), length
    rows = collate_tokens([row for part in parts for row in _rows_of(part)], length)
    rows = [x.reshape(*shape[:2], length) for x in rows]
    numbers = [[pair[2:] for pair in part.pairs] for part in parts]
    numbers = np.moveaxis(np.array(numbers, np.float32), 2, 0)
    return PreferenceBatch(TokenBatch(*rows), *numbers)


def _rows_of(part: PackedPairs) -> list[PackedRow]:
    """An empty side has no tokens, so that it makes no segment."""
    documents = [x for pair in part.pairs for x in (pair.chosen, pair.rejected)]
    return [
        join([documents[i] for i in row], [i + 1 for i in row]) for row in part.rows
    ]
