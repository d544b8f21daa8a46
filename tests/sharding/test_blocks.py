"""Tests for jalign/sharding/blocks.py, on eight devices of one process."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from jalign import sharding
from jalign.sharding import agreement, blocks
from tests.hlo import largest_buffer

MESHES = [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=4)]
# Of the file, its cuts, and rows that leave the last devices less, or nothing.
FILES = [((24, 16), ("tensor", "fsdp")), ((16, 40), ("fsdp", "tensor"))]
FILES += [((20, 8), (None, "fsdp")), ((4, 8, 16), (None, "tensor", "fsdp")), ((5,), ())]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_rows_are_read_once_and_joined_as_the_parameter_is_cut(sizes):
    mesh = sharding.make_mesh(**sizes)
    for shape, cuts in FILES:
        target = NamedSharding(mesh, P(*cuts))
        x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        seen = np.zeros(len(x), int)

        def rows(start, stop, x=x, seen=seen):
            seen[start:stop] += 1
            return x[start:stop]

        dealt = blocks.deal(target, range(len(shape)), shape)
        read = blocks.read(dealt, rows, x.dtype)
        assert (seen == 1).all(), "each row is read by one device"
        joined = jax.jit(lambda y, dealt=dealt: blocks.join(dealt, y))(read)
        assert joined.sharding.is_equivalent_to(target, len(shape)), (shape, cuts)
        np.testing.assert_array_equal(joined, x)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_fetched_array_comes_in_pieces(sizes, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE_BYTES", 1000)
    cut = NamedSharding(sharding.make_mesh(**sizes), P(None, "fsdp", "tensor"))
    for shape, index in (
        ((3, 16, 40), (2,)),
        ((2, 3, 24, 8), (1, 0)),
        ((16, 8, 7), ()),
    ):
        where = cut.update(spec=P(*(None,) * (len(index) - 1), *cut.spec))
        where = where if index else cut.update(spec=P("fsdp", "tensor"))
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        placed = jax.device_put(x, where)
        for fetch in (blocks.fetch, blocks._fetch_shared):
            out = np.zeros(x[index].T.shape, np.float32).T  # any strides
            fetch(placed, index, out)
            np.testing.assert_array_equal(out, x[index])
        blocks._fetch_shared(placed, index, None)
    out = np.zeros(x.shape)
    blocks.fetch(x, (), out)  # NumPy's
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_device_holds_more_than_a_piece(sizes):
    """Of [16, 512, 1024], 2 MiB a layer: one eighth of a layer at once."""
    where = NamedSharding(sharding.make_mesh(**sizes), P(None, "fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((16, 512, 1024), np.float32, sharding=where)
    place = jax.ShapeDtypeStruct((2,), np.int32)
    _, *local = where.shard_shape(x.shape)
    axis = int(np.argmax(local))
    lowered = blocks._piece.lower(x, place, axis, local[axis] // 8, where)
    memory = lowered.compile().memory_analysis()
    piece = 512 * 1024 * 4 // 8
    assert memory is not None
    assert memory.output_size_in_bytes == piece
    assert memory.temp_size_in_bytes <= 2.5 * piece


def test_no_device_holds_more_than_its_share_of_a_layer_while_it_is_joined():
    target = NamedSharding(sharding.make_mesh(data=2, fsdp=4), P(None, "fsdp"))
    dealt = blocks.deal(target, (0, 1), (512, 1024))
    x = jax.ShapeDtypeStruct((512, 1024), np.float32, sharding=dealt.place)
    join = jax.jit(lambda x: blocks.join(dealt, x))
    assert largest_buffer(str(join.lower(x).compile().as_text())) == 512 * 1024 // 4


def test_one_process_agrees_with_itself():
    """Two: tests/test_two_processes_files.py."""
    assert agreement.gather_objects({"a": 1}) == [{"a": 1}]
    assert [x.tobytes() for x in agreement.gather_bytes(b"ab")] == [b"ab"]
    with pytest.raises(KeyError, match="here"), agreement.together("reading"):
        raise KeyError("here")
