"""Tests for jalign/data/batching.py."""

import numpy as np
import pytest

from jalign.data.batching import (
    PackedPairs,
    bucket_length,
    collate_preferences,
    collate_tokens,
)
from jalign.data.encoding import Example
from jalign.data.examples import PreferenceExample, filler


def example(n, first=1, start=1):
    tokens = np.arange(first, first + n, dtype=np.int32)
    return Example(tokens, np.arange(n) >= start)


def test_buckets_are_few_and_fit():
    buckets = {bucket_length(n, 3000) for n in range(1, 3001)}
    want = {16, 32, 64, 128, 256, 320, 384, 448, 512, 640, 768, 896, 1024}
    want |= {1280, 1536, 1792, 2048, 2560, 3000}
    assert buckets == want
    assert all(n <= bucket_length(n, 3000) for n in range(1, 3001))
    assert bucket_length(5, 8) == 8
    with pytest.raises(ValueError, match="more than max_length"):
        bucket_length(9, 8)


def test_trap53_right_padding_with_positions_from_lengths():
    batch = collate_tokens([example(2), example(4)], 5)
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 0, 0, 0], [1, 2, 3, 4, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 0, 0], [0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.completion_mask.sum(1), [1, 3])
    dtypes = [leaf.dtype for leaf in batch]
    assert dtypes == [np.int32, bool, np.int32, np.int32]


def test_trap54_masks_come_from_lengths_not_from_pad_ids():
    zeros = Example(np.zeros(3, np.int32), np.array([False, True, True]))
    batch = collate_tokens([zeros], 5)  # its tokens are all equal to the padding
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.completion_mask, [[0, 1, 1, 0, 0]])


def test_trap61_the_last_token_is_known_from_the_segments():
    eos = Example(np.array([5, 2, 2], np.int32), np.array([False, True, True]))
    batch = collate_tokens([eos, example(5)], 6)  # pad could be 2, or unset
    last = (batch.segment_ids != 0).sum(1) - 1
    np.testing.assert_array_equal(last, [2, 4])


def test_trap63_filler_rows_have_no_segment_and_train_nothing():
    batch = collate_tokens([example(3), filler(example(3))], 4)
    for leaf in batch:
        assert not leaf[1].any()
    pair = PreferenceExample(example(3), example(2), 1.0, -1.0, -2.0)
    pairs = collate_preferences([pair, filler(pair)], 4)
    assert not pairs.rows.segment_ids[1].any()
    assert not pairs.rows.completion_mask[1].any()
    np.testing.assert_array_equal(pairs.margins, [[1], [0]])


def test_preferences_share_a_length_and_carry_reference_logps():
    pair = PreferenceExample(example(3), example(2, 7), 0.5, -1.0, -2.0)
    batch = collate_preferences([pair], 4)
    np.testing.assert_array_equal(batch.rows.tokens, [[[1, 2, 3, 0], [7, 8, 0, 0]]])
    ids = [[1, 1, 1, 0], [2, 2, 0, 0]]
    np.testing.assert_array_equal(batch.rows.segment_ids[0], ids)
    for leaf, value in zip(batch[1:], (0.5, -1, -2), strict=True):
        np.testing.assert_array_equal(leaf, np.full((1, 1), value))
        assert leaf.dtype == np.float32


def test_packed_pairs_are_told_apart_by_their_segments():
    pairs = [
        PreferenceExample(example(2, 10 * i), example(1, 10 * i + 5), float(i), -i, i)
        for i in range(1, 4)
    ]
    one = PackedPairs(pairs[:2], [[0, 3], [2, 1]])
    other = PackedPairs([pairs[2], filler(pairs[2])], [[1, 0], []])
    batch = collate_preferences([one, other], 4)
    want = [[[10, 11, 25, 0], [20, 21, 15, 0]], [[35, 30, 31, 0], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(batch.rows.tokens, want)
    want = [[[1, 1, 4, 0], [3, 3, 2, 0]], [[2, 1, 1, 0], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(batch.rows.segment_ids, want)
    np.testing.assert_array_equal(batch.rows.positions[0, 0], [0, 1, 0, 0])
    np.testing.assert_array_equal(batch.margins, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(batch.ref_chosen_logps, [[-1, -2], [-3, 0]])
    np.testing.assert_array_equal(batch.ref_rejected_logps, [[1, 2], [3, 0]])
    with pytest.raises(ValueError, match="parts of different numbers"):
        collate_preferences([one, pairs[2]], 4)


def test_too_long_an_example_is_an_error():
    with pytest.raises(ValueError, match="does not fit"):
        collate_tokens([example(5)], 4)
    with pytest.raises(ValueError, match="row of 5 tokens does not fit"):
        collate_tokens([[example(3), example(2)]], 4)
