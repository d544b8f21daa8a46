"""Rows are packed where that saves work, and in few shapes."""

import numpy as np
import pytest

from jalign.data.examples import PreferenceExample
from jalign.data.layout import choose_layout, length_of, packed_rows
from jalign.data.packing import MAX_PACKED, pack
from tests.data.test_batching import example

SAMPLES = [np.arange(i, i + 16) for i in range(0, 64, 16)]


def layout(examples, **options):
    defaults = {"max_length": 256, "pack_rows": 1, "hosts": 1, "sample": SAMPLES}
    return choose_layout(examples, 16, **{**defaults, **options})


def examples(seed, low, high, n=64):
    lengths = np.random.default_rng(seed).integers(low, high, n)
    return [example(int(length)) for length in lengths]


def test_rows_of_one_length_stay_apart():
    found = layout(examples(0, 30, 33), max_length=32)
    assert found.row_length == 0 and length_of(SAMPLES[0], found) == 32


def test_packed_rows_stay_as_they_are():
    rows = pack([example(5) for _ in range(400)], 32)
    assert layout(rows).row_length == 0


def test_without_pack_rows_nothing_is_packed():
    assert layout(examples(0, 2, 250)).row_length > 0
    assert layout(examples(0, 2, 250), pack_rows=0).row_length == 0


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_every_example_of_a_batch_has_one_place(hosts):
    found = layout(examples(1, 2, 250), hosts=hosts)
    for indices in SAMPLES:
        parts = packed_rows(indices, found)
        assert len(parts) == hosts and len({len(rows) for rows in parts}) == 1
        placed = [i for rows in parts for row in rows for i in row]
        np.testing.assert_array_equal(np.sort(placed), indices)
        for rows in parts:
            for row in rows:
                assert found.lengths[row].sum() <= length_of(indices, found)
                assert len(row) <= MAX_PACKED


def test_both_sides_of_a_pair_fit_their_row():
    sides = zip(examples(2, 2, 60), examples(3, 2, 250), strict=True)
    found = layout([PreferenceExample(*pair) for pair in sides])
    assert found.lengths.shape == (64, 2) and found.row_length
    for row in packed_rows(SAMPLES[0], found)[0]:
        assert (found.lengths[row].sum(0) <= found.row_length).all()


def test_few_numbers_of_rows_occur():
    many = examples(0, 2, 250, n=300)
    rng = np.random.default_rng(1)
    batches = [rng.permutation(300)[:64] for _ in range(40)]
    found = choose_layout(
        many, 64, max_length=256, pack_rows=1, hosts=1, sample=batches
    )
    assert found.row_length
    assert len({len(packed_rows(b, found)[0]) for b in batches}) <= 8
