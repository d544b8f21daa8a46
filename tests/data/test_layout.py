"""Rows are packed where that saves work, and in few shapes."""

import numpy as np
import pytest

from jalign.data.examples import PreferenceExample
from jalign.data.layout import Part, assemble, choose_layout, length_of, packed_parts
from jalign.data.packing import pack
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


def pairs(n=64):
    sides = zip(examples(2, 2, 60, n), examples(3, 2, 250, n), strict=True)
    return [PreferenceExample(*pair) for pair in sides]


@pytest.mark.parametrize("items", [examples(1, 2, 250), pairs()], ids=["rows", "pairs"])
@pytest.mark.parametrize("hosts, pieces", [(1, 1), (2, 2), (4, 8), (1, 3)])
def test_every_side_of_a_batch_has_one_place(items, hosts, pieces):
    found = layout(items, hosts=hosts, pack_rows=pieces)._replace(row_length=256)
    sides = found.lengths.shape[1]
    for indices in SAMPLES:
        shares = packed_parts(indices, found)
        assert len(shares) == hosts
        everywhere = [part for share in shares for part in share]
        if sides == 2:
            assert len(everywhere) == pieces
        assert len({(len(p.rows), len(p.examples)) for p in everywhere}) == 1
        assert len(everywhere) * len(everywhere[0].rows) % pieces == 0
        members = [i for part in everywhere for i in part.examples if i >= 0]
        np.testing.assert_array_equal(np.sort(members), indices)
        for part in everywhere:
            lengths = found.lengths[[i for i in part.examples if i >= 0]].ravel()
            placed = [i for row in part.rows for i in row]
            np.testing.assert_array_equal(np.sort(placed), np.arange(len(lengths)))
            for row in part.rows:
                assert lengths[row].sum() <= length_of(indices, found)


def test_a_place_without_an_example_is_filler():
    items = pairs(3)
    (part,) = assemble([Part([2, 0, -1], [[0, 3], [1, 2]])], items)
    assert part.pairs[:2] == [items[2], items[0]] and part.rows == [[0, 3], [1, 2]]
    assert all(len(side.tokens) == 0 for side in part.pairs[2][:2])
    documents = examples(0, 2, 9, 4)
    rows = assemble([Part([3, 1], [[1], [0]])], documents)
    assert rows == [[documents[1]], [documents[3]]]


def test_few_numbers_of_rows_occur():
    many = examples(0, 2, 250, n=300)
    rng = np.random.default_rng(1)
    batches = [rng.permutation(300)[:64] for _ in range(40)]
    found = choose_layout(
        many, 64, max_length=256, pack_rows=1, hosts=1, sample=batches
    )
    assert found.row_length
    assert len({len(packed_parts(b, found)[0][0].rows) for b in batches}) <= 8
