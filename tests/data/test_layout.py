"""Rows are packed where that saves work, and in few shapes."""

import numpy as np
import pytest

from jalign.data.batching import (
    Part,
    assemble,
    fill_rows,
    length_of,
    pack,
    packed_parts,
)
from jalign.data.examples import PreferenceExample
from jalign.data.loader import (
    _holds_all,
    balanced_order,
    choose_layout,
    choose_sizes,
)
from tests.data.test_batching import example

SAMPLES = [np.arange(i, i + 16) for i in range(0, 64, 16)]


def layout(examples, **options):
    defaults = {"max_length": 256, "pack_rows": 1, "hosts": 1}
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


def packed_layout(items, **options):
    """In rows of 256 tokens, of the one number that holds any examples."""
    found = layout(items, **options)._replace(row_length=256, limit=256)
    return found._replace(sizes=(_holds_all(found),))


@pytest.mark.parametrize("items", [examples(1, 2, 250), pairs()], ids=["rows", "pairs"])
@pytest.mark.parametrize("hosts, pieces", [(1, 1), (2, 2), (4, 8), (1, 3)])
def test_every_side_of_a_batch_has_one_place(items, hosts, pieces):
    found = packed_layout(items, hosts=hosts, pack_rows=pieces)
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


@pytest.mark.parametrize("pack_rows", [0, 1, 4])
@pytest.mark.parametrize("sides", [1, 2])
def test_two_shapes_hold_whatever_comes(sides, pack_rows):
    """Mostly short ones, and the longest of all together."""
    items = examples(0, 2, 60, 280) + examples(4, 200, 250, 20)
    if sides == 2:
        items = [PreferenceExample(x, x) for x in items]
    rng = np.random.default_rng(1)
    batches = [rng.permutation(300)[:16] for _ in range(60)]
    found = layout(items, pack_rows=pack_rows)
    assert bool(found.row_length) == bool(pack_rows) and len(found.sizes) == 2
    batches.append(np.arange(284, 300))
    if pack_rows:
        parts = [packed_parts(indices, found)[0] for indices in batches]
        shapes = [sum(len(part.rows) for part in several) for several in parts]
    else:
        shapes = [length_of(indices, found) for indices in batches]
    assert len(set(shapes)) == 2 and shapes[-1] == max(shapes)
    assert np.mean(shapes) < 0.85 * max(shapes)


def test_one_shape_where_a_second_saves_little_or_all_batches_are_known():
    assert choose_sizes([2, 2, 8, 10], 10, float) == (2, 10)
    assert choose_sizes([9, 9, 9, 10], 10, float) == (9, 10)
    assert choose_sizes([96, 99, 100], 100, float) == (100,)
    known = [np.arange(16), np.arange(16, 24)]
    (size,) = layout(pairs(), batches=known, pack_rows=0).sizes
    assert size == 256
    found = layout(pairs(), batches=known)
    most = max(len(fill_rows(found.lengths[b].ravel(), 256)) for b in known)
    assert found.row_length == 256 and found.sizes == (most,) and most < 32


def test_balanced_batches_need_equally_many_rows():
    items = pairs(66)
    order = balanced_order(items, 8)
    np.testing.assert_array_equal(np.sort(order), np.arange(66))
    sums = layout(items).lengths.sum(axis=1)
    lots = [sums[order[start : start + 8]].sum() for start in range(0, 64, 8)]
    plain = [sums[start : start + 8].sum() for start in range(0, 64, 8)]
    assert np.ptp(lots) < 0.5 * np.ptp(plain)
