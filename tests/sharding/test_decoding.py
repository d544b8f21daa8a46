"""The mesh that decodes (decoding.py): chosen by what fits, and moved to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import models, sharding
from jalign.models.decoding import decoding_bytes

CONFIG = models.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
)


@pytest.mark.parametrize(
    "room, sizes",
    [
        (None, (8, 1, 1)),  # not known: whole copies
        (4 * 1000, (8, 1, 1)),
        (4 * 500, (4, 1, 2)),
        (4 * 499, (2, 1, 4)),
        (4 * 1, (1, 1, 8)),  # nothing has room: the least
    ],
)
def test_the_smallest_tensor_that_has_room(room, sizes):
    mesh = sharding.make_mesh(fsdp=8)
    found = sharding.decoding_mesh(mesh, lambda m: 1000 // m.shape["tensor"], room)
    assert (found.shape["data"], found.shape["fsdp"], found.shape["tensor"]) == sizes
    assert list(found.devices.flat) == list(mesh.devices.flat)
    abstract = sharding.abstract_mesh(8)
    found = sharding.decoding_mesh(abstract, lambda m: 1000 // m.shape["tensor"], room)
    assert (found.shape["data"], found.shape["fsdp"], found.shape["tensor"]) == sizes


def test_a_mesh_that_does_not_divide_is_passed_over_and_tensor_is_kept():
    def bytes_on(mesh):
        if mesh.shape["tensor"] == 4:
            raise ValueError("4 does not divide")
        return 1000 // mesh.shape["tensor"]

    mesh = sharding.make_mesh(tensor=2)
    assert sharding.decoding_mesh(mesh, bytes_on, 4 * 400).shape["tensor"] == 8
    assert sharding.decoding_mesh(mesh, bytes_on).shape["tensor"] == 2

    def never(mesh):
        raise ValueError("nothing divides")

    assert sharding.decoding_mesh(mesh, never) is mesh


@pytest.mark.parametrize("sizes", [dict(), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("room", [None, 4 * 18_000])
def test_parameters_are_cast_and_moved_as_they_are(sizes, room):
    mesh = sharding.make_mesh(**sizes)
    model = models.Model(CONFIG, mesh, jnp.bfloat16)
    params = model.init(jax.random.key(0))
    decoder, laid_out = model.on_decoding_mesh(params, 8, 16, room)
    assert decoder.mesh is not None
    assert decoder.mesh.shape["tensor"] == (4 if room else sizes.get("tensor", 1))
    moved = laid_out(params)
    places = sharding.param_shardings(decoder.mesh, params)
    weights, _ = decoding_bytes(decoder, decoder.mesh, params, 8, 16)
    assert weights == sharding.shard_bytes(moved, places)
    for (path, x), y, place in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(moved),
        jax.tree.leaves(places),
        strict=True,
    ):
        kept = path[-1].key == "scale"
        assert y.dtype == (jnp.float32 if kept else jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(x.astype(y.dtype)), np.asarray(y))
        assert y.sharding.is_equivalent_to(place, y.ndim), path


def test_on_one_device_nothing_is_moved():
    model = models.Model(CONFIG)
    params = model.init(jax.random.key(0))
    decoder, laid_out = model.on_decoding_mesh(params, 8, 16)
    assert decoder is model and laid_out(params) is params
    assert sharding.device_bytes(None) is None  # a CPU does not tell


def test_no_move_holds_a_whole_leaf_where_a_part_is_asked_for():
    mesh = sharding.make_mesh()
    model = models.Model(CONFIG, mesh)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        model.param_shapes(),
        sharding.param_shardings(mesh, model.param_shapes()),
    )
    decoder, laid_out = model.on_decoding_mesh(params, 8, 16, 4 * 24_000)
    memory = jax.jit(laid_out).lower(params).compile().memory_analysis()
    weights, _ = decoding_bytes(decoder, decoder.mesh, params, 8, 16)
    assert memory is not None and memory.temp_size_in_bytes < 1.2 * weights


def test_a_part_is_asked_for_between_and_the_place_of_an_activation_is_told():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    place = sharding.activation_sharding(mesh, (8, 6, 3), "batch", "act_heads", None)
    assert place.shard_shape((8, 6, 3)) == (2, 3, 3)
    target = sharding.decoding_mesh(mesh, lambda m: 1)
    x = {"unembed": {"kernel": jnp.arange(64.0).reshape(8, 8)}}
    placed = jax.device_put(x, sharding.param_shardings(mesh, x))
    moved = jax.jit(lambda x: sharding.relay(x, mesh, target))(placed)
    np.testing.assert_array_equal(x["unembed"]["kernel"], moved["unembed"]["kernel"])
    assert moved["unembed"]["kernel"].sharding.shard_shape((8, 8)) == (8, 4)
