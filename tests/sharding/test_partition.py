"""Strict partitioning, optimizer states, constraints and shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

from jalign import sharding
from jalign.types import TrainState

from . import layout


def _raises(shapes, *parts, **kwargs):
    mesh = kwargs.pop("mesh", None) or sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with pytest.raises(ValueError) as info:
        sharding.param_shardings(mesh, shapes, **kwargs)
    assert all(part in str(info.value) for part in parts), info.value


def test_unmatched_path_is_named():
    _raises({"layers": {"conv": {"kernel": jnp.ones((2, 2))}}}, "layers/conv/kernel")


def test_a_path_must_match_whole():
    _raises({"my": {"norm": {"scale": jnp.ones(2)}}}, "my/norm/scale", "no sharding")


def test_wrong_rank_is_named():
    _raises({"norm": {"scale": jnp.ones((2, 2))}}, "norm/scale", "(2, 2)", "2 axes")


def test_mesh_axis_used_twice_is_named():
    rules = [(r"a/kernel", ("heads", "mlp"))]
    tree = {"a": {"kernel": jnp.ones((4, 4))}}
    _raises(tree, "a/kernel", "tensor", "two dimensions", param_rules=rules)


def test_unknown_logical_axis_is_named():
    rules = [(r"a/kernel", ("haeds", None))]
    _raises({"a": {"kernel": jnp.ones((4, 4))}}, "a/kernel", "haeds", param_rules=rules)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        (dict(V=15), ("embed/embedding", "dimension 0", "vocab", "15", "tensor", "2")),
        (dict(D=7), ("embed/embedding", "dimension 1", "embed", "7", "fsdp", "2")),
        (dict(N=3), ("layers/attention/", "heads", "3", "tensor", "2")),
        (dict(F=23), ("layers/mlp/", "mlp", "23", "tensor", "2")),
    ],
)
def test_uneven_dimension_names_path_dim_axis_and_sizes(sizes, parts):
    _raises(layout.shapes(**sizes), *parts)


def test_kv_heads_are_replicated_where_they_do_not_divide():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    got = layout.flat(sharding.param_shardings(mesh, layout.shapes(K=2)))
    assert got["layers/attention/k/kernel"].spec == P(None, "fsdp", None, None)
    assert got["layers/attention/q/kernel"].spec == P(None, "fsdp", "tensor", None)


@pytest.mark.parametrize("make", [optax.adamw, optax.adafactor, contrib.muon])
def test_moments_lie_where_their_parameters_do(make):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shapes = layout.shapes()

    def init(params, key):
        tx = optax.chain(optax.clip_by_global_norm(1.0), make(1e-3))
        return TrainState(jnp.int32(0), params, tx.init(params), key)

    state = jax.eval_shape(init, shapes, jax.random.key(0))
    placed = sharding.state_shardings(mesh, state)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    params = layout.flat(sharding.param_shardings(mesh, shapes))
    assert layout.flat(placed.params) == params
    if make is optax.adamw:
        moments = placed.opt_state[1][0]
        assert layout.flat(moments.mu) == layout.flat(moments.nu) == params
        assert moments.count.spec == P()
    assert placed.step.spec == placed.key.spec == P()
    jax.jit(init, out_shardings=placed)(
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), jax.random.key(0)
    )


def test_a_batch_is_cut_over_data_and_fsdp_and_not_over_tensor():
    assert sharding.batch_parts(None) == 1
    assert sharding.batch_parts(sharding.make_mesh(data=2, fsdp=2, tensor=2)) == 4


def test_constrain_is_a_no_op_without_a_mesh_or_on_one_device():
    x = jnp.ones((4, 2))
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert sharding.constrain(x, None, "batch", "nonsense") is x
    assert sharding.constrain(x, one, "batch", "time") is x


def test_constrain_lays_rows_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    x = jnp.arange(8.0 * 4).reshape(8, 4)
    y = jax.jit(lambda x: sharding.constrain(x, mesh, "batch", "act_mlp"))(x)
    assert y.sharding.spec == P(("data", "fsdp"), "tensor")
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_constrain_leaves_out_axes_that_do_not_divide(rows):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    x = jnp.ones((rows, 2))
    y = jax.jit(lambda x: sharding.constrain(x, mesh, "batch", None))(x)
    np.testing.assert_array_equal(x, y)


def test_constrain_checks_names_and_rank():
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="no logical axis 'bacth'"):
        sharding.constrain(jnp.ones((8, 2)), mesh, "bacth", None)
    with pytest.raises(ValueError, match="has not the axes"):
        sharding.constrain(jnp.ones((8, 2)), mesh, "batch")
    with pytest.raises(ValueError, match="two dimensions"):
        sharding.constrain(jnp.ones((8, 2)), mesh, "act_heads", "act_mlp")


def test_shard_map_runs_on_shards():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    seen = []

    def double(x, w):
        seen.append((x.shape, w.shape))
        return 2 * x * w[None]

    x, w = jnp.arange(8.0 * 4).reshape(8, 4), jnp.arange(4.0)
    axes = [("batch", "act_heads"), ("act_heads",)]
    fn = sharding.shard_map(double, mesh, axes, ("batch", "act_heads"))
    np.testing.assert_array_equal(jax.jit(fn)(x, w), 2 * x * w[None])
    assert seen[-1] == ((2, 2), (2,))
    assert sharding.shard_map(double, None, axes, ("batch", "act_heads")) is double
