"""Examples to arrays: documents behind each other in rows, padded to few lengths.

The documents of an example are its sides: itself, or of a pair `chosen` and `rejected`.
So document `2 p + side` of packed pairs is a side of pair p, and its segment id is one
more, as `types.PreferenceBatch` has it.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample, filler, sides
from jalign.types import PreferenceBatch, TokenBatch


class PackedRow(NamedTuple):
    """Several documents behind each other; fields as in `TokenBatch`, each [T]."""

    tokens: np.ndarray
    completion_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class PackedPairs(NamedTuple):
    """Pairs whose sides lie in common rows.

    Attributes:
      pairs: the P pairs; one without tokens is filler.
      rows: of each row the documents, 2 p for the chosen side of pair p and 2 p + 1
        for the rejected one.
    """

    pairs: Sequence[PreferenceExample]
    rows: Sequence[Sequence[int]]


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
    batch = TokenBatch(*_zeros(len(examples), length))
    for i, example in enumerate(examples):
        row: Any = [example] if isinstance(example, Example) else example
        row = row if isinstance(row, PackedRow) else join(row)
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
    rows = []
    for part in parts:
        documents = [side for pair in part.pairs for side in sides(pair)]
        for row in part.rows:
            rows.append(join([documents[i] for i in row], [i + 1 for i in row]))
    batch = collate_tokens(rows, length)
    batch = [leaf.reshape(len(parts), -1, length) for leaf in batch]
    numbers = [[pair[2:] for pair in part.pairs] for part in parts]
    numbers = np.moveaxis(np.array(numbers, np.float32), 2, 0)
    return PreferenceBatch(TokenBatch(*batch), *numbers)


def in_multiples(
    collate: Callable[[Any, int], Any], multiple: int
) -> Callable[[Any, int], Any]:
    """The same collate with lengths rounded up: devices cut rows into so many."""
    return lambda examples, length: collate(examples, round_up(length, multiple))


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def pack(examples: Sequence[Example], length: int) -> list[PackedRow]:
    """Puts whole documents into rows of at most `length` tokens, each exactly once.

    A function of the examples and the length only, over the whole data set.

    Raises: ValueError if an example is longer than `length`.
    """
    rows = fill_rows([len(example.tokens) for example in examples], length)
    return [join([examples[i] for i in row]) for row in rows]


def fill_rows(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Which documents are put into the same row, of at most `row_length` tokens.

    Longest first, each into the fullest row that still has room (best fit decreasing).

    Args:
      lengths: tokens of each document; one without any is left out.

    Returns: the documents' indices, row by row.
    Raises: ValueError if one is longer than `row_length`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(np.flatnonzero(lengths).tolist(), key=lambda i: -lengths[i]):
        n = int(lengths[i])
        if n > row_length:
            raise ValueError(f"example of {n} tokens does not fit into {row_length}")
        place = bisect_left(room, (n, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
        if free > n:
            insort(room, (free - n, row))
    return rows


def join(
    documents: Sequence[Example], segments: Sequence[int] | None = None
) -> PackedRow:
    """The documents behind each other, as segments 1, 2, ... or as those given."""
    row = PackedRow(*_zeros(sum(len(document.tokens) for document in documents)))
    numbers, start = segments or range(1, len(documents) + 1), 0
    for number, (tokens, mask) in zip(numbers, documents, strict=True):
        end = start + len(tokens)
        row.tokens[start:end] = tokens
        # Nothing in this document predicts its first token.
        row.completion_mask[start + 1 : end] = mask[1:]
        row.segment_ids[start:end] = number
        row.positions[start:end] = np.arange(len(tokens))
        start = end
    return row


def _zeros(*shape: int) -> list[np.ndarray]:
    """For the fields of a `TokenBatch`."""
    return [np.zeros(shape, kind) for kind in (np.int32, bool, np.int32, np.int32)]


class Part(NamedTuple):
    """Some examples of a batch, packed into rows.

    Attributes:
      examples: their indices, -1 for filler.
      rows: of each row the documents, counted over the sides of `examples`; the last
        rows may be empty.
    """

    examples: list[int]
    rows: list[list[int]]


class Layout(NamedTuple):
    """How batches lie in rows.

    Attributes:
      lengths: tokens of each side of each example [n, sides].
      limit: the longest padded row without packing.
      row_length: of packed rows; 0 where a side has a row of its own.
      parts: that a host's examples are packed in, each by itself.
      places: for examples in a part.
      quantum: what the number of a part's packed rows is a multiple of.
      hosts: how many share a batch.
      sizes: one or two, ascending, of which a batch has the first that holds it: rows
        of a part where they are packed, else their padded length.
    """

    lengths: np.ndarray
    limit: int
    row_length: int
    parts: int
    places: int
    quantum: int
    hosts: int
    sizes: tuple[int, ...] = ()


def length_of(indices: np.ndarray, layout: Layout) -> int:
    """The padded length of the rows of a global batch."""
    return layout.row_length or first_that_holds(size_needed(indices, layout), layout)


def packed_parts(indices: np.ndarray, layout: Layout) -> list[list[Part]]:
    """For each host, its parts of a global batch; all of equally many rows."""
    found = _packed(indices, layout)
    count = first_that_holds(max(len(part.rows) for part in found), layout)
    for part in found:
        part.rows.extend([] for _ in range(count - len(part.rows)))
    each = layout.parts
    return [found[i : i + each] for i in range(0, len(found), each)]


def assemble(parts: Sequence[Part], examples: Sequence[Any]) -> list[Any]:
    """A host's parts as `collate_preferences` or `collate_tokens` takes them."""
    if not isinstance(examples[0], PreferenceExample):
        rows = [(part, row) for part in parts for row in part.rows]
        return [[examples[part.examples[i]] for i in row] for part, row in rows]
    none = filler(examples[0])
    return [
        PackedPairs([none if i < 0 else examples[i] for i in part.examples], part.rows)
        for part in parts
    ]


def _packed(indices: np.ndarray, layout: Layout) -> list[Part]:
    """All hosts' parts of a global batch, behind each other, without empty rows."""
    found = []
    for share in np.array_split(indices, layout.hosts):
        for part in np.array_split(share, layout.parts):
            rows = fill_rows(layout.lengths[part].ravel(), layout.row_length)
            members = part.tolist() + [-1] * (layout.places - len(part))
            found.append(Part(members, rows))
    return found


def size_needed(indices: np.ndarray, layout: Layout) -> int:
    """The size that a global batch has to have at least."""
    if not layout.row_length:
        return bucket_length(int(layout.lengths[indices].max()), layout.limit)
    most = max(len(part.rows) for part in _packed(indices, layout))
    return -(-most // layout.quantum) * layout.quantum


def first_that_holds(need: int, layout: Layout) -> int:
    return next(size for size in layout.sizes if size >= need)
