"""Tests for jalign/losses/chunks.py."""

import numpy as np
import pytest

from jalign.losses.chunks import FOLD, chunk_grid, join_chunks, split_chunks


def pieces(batch, time, chunk_size):
    grid = chunk_grid(np.zeros((batch, time)), chunk_size)
    return grid.pieces_b, grid.pieces_t


def test_chunks_are_as_large_as_they_may_be_and_no_larger():
    """(batch, time, chunk_size) -> pieces of either axis."""
    assert pieces(1, 6, 4) == (1, 2)
    assert pieces(8, 6, 4) == (2, 6)
    assert pieces(2, 6, 4) == (1, 3)
    assert pieces(2, 6, 16) == (1, 1)


def test_a_lone_row_has_chunks_that_can_be_folded():
    """(batch, time, chunk_size) -> positions of a chunk."""

    def size(batch, time, chunk_size):
        return chunk_grid(np.zeros((batch, time)), chunk_size).size

    assert size(1, 20, 64) == 24 and size(1, 100, 63) == 56
    assert size(1, 5, FOLD) == FOLD
    assert size(1, 5, FOLD - 1) == 5  # too small for it
    assert size(2, 20, 64) == 20  # not a lone row
    assert size(3, 5, 3) == 1


@pytest.mark.parametrize("batch, time", [(1, 70), (1, 64), (1, 5), (5, 9), (40, 3)])
@pytest.mark.parametrize("chunk_size", [1, 7, 20, 33, 1000])
def test_every_position_has_one_place_in_a_chunk(batch, time, chunk_size):
    x = np.arange(1, batch * time * 2 + 1).reshape(batch, time, 2)
    grid = chunk_grid(x, chunk_size)
    chunks = split_chunks(x, grid)
    assert chunks[0, :, :, 0].size <= max(chunk_size, FOLD if batch == 1 else 1)
    assert np.count_nonzero(chunks) == x.size
    np.testing.assert_array_equal(join_chunks(chunks, grid), x)


def test_a_lone_row_becomes_several_rows_of_a_chunk():
    x = np.arange(64)[None]
    chunks = split_chunks(x, chunk_grid(x, 32))
    assert chunks.shape == (2, FOLD, 4)
    np.testing.assert_array_equal(chunks.reshape(-1), np.arange(64))
