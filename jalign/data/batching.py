"""Examples to arrays: padding to few lengths, and packing."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample
from jalign.types import PreferenceBatch, TokenBatch


class PackedRow(NamedTuple):
    """Several documents behind each other; fields as in `TokenBatch`, each [T]."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


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


def collate_tokens(examples: Sequence[Example | PackedRow], length: int) -> TokenBatch:
    """Pads on the right. An example without tokens becomes a filler row.

    Args:
      examples: B documents or packed rows, none longer than `length`.
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
        n = len(example.tokens)
        if n > length:
            raise ValueError(f"example of {n} tokens does not fit into {length}")
        batch.tokens[i, :n] = example.tokens
        batch.completion_mask[i, :n] = example.completion_mask
        packed = isinstance(example, PackedRow)
        batch.segment_ids[i, :n] = example.segment_ids if packed else 1
        batch.positions[i, :n] = example.positions if packed else np.arange(n)
    return batch


def collate_preferences(
    examples: Sequence[PreferenceExample],
    length: int,
    *,
    ref_chosen_logps: np.ndarray | None = None,
    ref_rejected_logps: np.ndarray | None = None,
) -> PreferenceBatch:
    """Pads both sides to one length; reference logps are the examples' own, or given.

    Args:
      examples: B pairs.
      length: T.
      ref_chosen_logps, ref_rejected_logps: float32 [B], nats, instead of the examples'.

    Returns: PreferenceBatch of [B, T] and float32 [B] arrays.
    """
    if ref_chosen_logps is None:
        ref_chosen_logps = np.array([e.ref_chosen_logp for e in examples])
    if ref_rejected_logps is None:
        ref_rejected_logps = np.array([e.ref_rejected_logp for e in examples])
    return PreferenceBatch(
        chosen=collate_tokens([e.chosen for e in examples], length),
        rejected=collate_tokens([e.rejected for e in examples], length),
        margins=np.array([e.margin for e in examples], np.float32),
        ref_chosen_logps=np.asarray(ref_chosen_logps, np.float32),
        ref_rejected_logps=np.asarray(ref_rejected_logps, np.float32),
    )


def pack(examples: Sequence[Example], length: int) -> list[PackedRow]:
    """Puts whole documents into rows of at most `length` tokens, each exactly once.

    Longest first, each into the fullest row that still has room (best fit decreasing):
    a function of the examples and the length only, over the whole data set.

    Raises: ValueError if an example is longer than `length`.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in order:
        n = len(examples[i].tokens)
        if n > length:
            raise ValueError(f"example of {n} tokens does not fit into {length}")
        place = bisect_left(room, (n, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        if free > n:
            insort(room, (free - n, row))
    return [_packed_row([examples[i] for i in row]) for row in rows]


def _packed_row(documents: Sequence[Example]) -> PackedRow:
    lengths = [len(document.tokens) for document in documents]
    masks = [np.array(document.completion_mask) for document in documents]
    for mask in masks:
        mask[:1] = False  # nothing in this document predicts its first token
    return PackedRow(
        tokens=np.concatenate([d.tokens for d in documents]).astype(np.int32),
        completion_mask=np.concatenate(masks),
        segment_ids=np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
    )
