"""Tests for jalign/losses/chunks.py."""

import jax
import numpy as np
import pytest

from jalign.losses.chunks import Front, back, make_front, to_front

RNG = np.random.default_rng(0)
MASK = RNG.random((5, 9)) < 0.5
MASK[1], MASK[3] = False, True


def test_counted_positions_come_first_each_part_in_order():
    front = make_front(MASK)
    for row, mask in zip(np.asarray(front.order), MASK, strict=True):
        want = [*np.flatnonzero(mask), *np.flatnonzero(~mask)]
        np.testing.assert_array_equal(row, want)
    assert front.longest == 9 and make_front(MASK[:1]).longest == MASK[0].sum()
    np.testing.assert_array_equal(front.inverse, np.argsort(front.order))


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_there_and_back_again(shape):
    x, front = RNG.normal(size=(5, 9, *shape)).astype(np.float32), make_front(MASK)
    moved = to_front(x, front)
    for row, order, there in zip(x, np.asarray(front.order), moved, strict=True):
        np.testing.assert_array_equal(there, row[order])
    if not shape:
        np.testing.assert_array_equal(back(moved, front, MASK), np.where(MASK, x, 0))


def test_the_gradient_goes_the_other_way_and_is_no_scatter():
    x, front = RNG.normal(size=(5, 9, 3)).astype(np.float32), make_front(MASK)
    weights = RNG.normal(size=x.shape).astype(np.float32)
    gradient = jax.grad(lambda x: (weights * to_front(x, front)).sum())
    there = Front(front.inverse, front.order, front.longest)
    np.testing.assert_array_equal(gradient(x), to_front(weights, there))
    assert "scatter" not in str(jax.make_jaxpr(gradient)(x))


def test_no_row_at_all():
    assert make_front(MASK[:0]).longest == 0


def test_no_position_at_all():
    front = make_front(np.zeros((2, 4), bool))
    assert front.longest == 0
    np.testing.assert_array_equal(front.order, [[0, 1, 2, 3]] * 2)
