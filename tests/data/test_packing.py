"""Tests for the packing of jalign/data/batching.py."""

import numpy as np
import pytest

from jalign.data.batching import collate_tokens, fill_rows, join, pack
from tests.data.test_batching import example


def test_trap59_packing_keeps_every_document_whole_and_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 3000)  # more than one map batch of 1,000 rows
    documents = [example(n, first=100 * i) for i, n in enumerate(lengths)]
    rows = pack(documents, 64)
    found = {}
    for row in rows:
        assert len(row.tokens) <= 64
        for segment in range(1, row.segment_ids.max() + 1):
            tokens = row.tokens[row.segment_ids == segment]
            found[int(tokens[0])] = tokens
    assert len(found) == 3000
    for document in documents:
        np.testing.assert_array_equal(found[document.tokens[0]], document.tokens)
    assert len(rows) <= np.ceil(lengths.sum() / 64) * 1.02


def test_trap60_packed_documents_are_told_apart():
    rows = pack([example(3, 10, start=0), example(2, 20, start=0)], 8)
    batch = collate_tokens(rows, 8)
    np.testing.assert_array_equal(batch.tokens, [[10, 11, 12, 20, 21, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 2, 2, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0, 0, 0]])
    # The first token of a document is not predicted from the document before it.
    np.testing.assert_array_equal(batch.completion_mask, [[0, 1, 1, 0, 1, 0, 0, 0]])


def test_packing_trains_the_same_tokens():
    documents = [example(n) for n in (5, 3, 8, 2)]
    apart = collate_tokens(documents, 8)
    packed = collate_tokens(pack(documents, 8), 8)
    assert packed.completion_mask.sum() == apart.completion_mask.sum()
    assert len(packed.tokens) == 3


def test_rows_hold_no_more_than_fits():
    assert fill_rows([5, 4, 3, 3], 8) == [[0, 2], [1, 3]]
    assert fill_rows([2, 0, 6, 7], 8) == [[3], [2, 0]]  # one without tokens: nowhere
    assert fill_rows([], 8) == []
    with pytest.raises(ValueError, match="example of 9 tokens does not fit into 8"):
        fill_rows([2, 9], 8)


def test_a_list_of_documents_is_a_row():
    documents = [example(3, 10, start=0), example(2, 20, start=0)]
    packed, joined = (
        collate_tokens(rows, 8) for rows in (pack(documents, 8), [documents])
    )
    for a, b in zip(packed, joined, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(leaf.size == 0 for leaf in join([]))
