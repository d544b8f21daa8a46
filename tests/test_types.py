"""Tests for jalign/types.py: pytrees whose every field is explained."""

import inspect

import jax
import numpy as np
import pytest

from jalign import types

CLASSES = [
    value
    for value in vars(types).values()
    if inspect.isclass(value) and value.__module__ == types.__name__
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_is_in_the_docstring(cls):
    for field in cls._fields:
        assert field in (cls.__doc__ or ""), f"{cls.__name__}.{field}"


def test_a_batch_is_a_pytree_whose_leaves_keep_their_row_axis():
    rows = types.TokenBatch(*(np.zeros((4, 3), np.int32) for _ in range(4)))
    pairs = types.PreferenceBatch(rows, *(np.zeros((4, 1), np.float32),) * 3)
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), pairs)
    assert isinstance(halves.rows, types.TokenBatch)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(halves)} == {2}
