"""Tests for jalign/models/model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models import Model, add_scalar_head, add_value_head, split_heads
from tests.models.tiny import CONFIGS, random_params, random_tokens


def test_is_hashable_and_static():
    a, b = Model(CONFIGS["llama"]), Model(CONFIGS["llama"], dtype=jnp.dtype("float32"))
    assert a == b and hash(a) == hash(b)
    shapes = jax.eval_shape(lambda key: b.init(key), jax.random.key(0))
    assert shapes["embed"]["embedding"].shape == (48, 24)
    apply = jax.jit(Model.apply, static_argnums=0)
    hidden, _ = apply(a, random_params(a), random_tokens())
    assert hidden.shape == (2, 12, 24)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_init_matches_param_shapes_and_is_random(name, key):
    model = Model(CONFIGS[name])
    params, shapes = model.init(key), model.param_shapes()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    q = params["layers"]["attention"]["q"]["kernel"]
    assert np.std(q) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(q[0], q[1])
    assert ("unembed" in params) == (name not in ("llama3", "reward"))


def test_mesh_changes_neither_init_nor_hidden(key):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    alone, meshed = Model(CONFIGS["qwen2"]), Model(CONFIGS["qwen2"], mesh=mesh)
    params, sharded = alone.init(key), meshed.init(key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, sharded
    )
    want, _ = alone.apply(params, random_tokens((4, 12)))
    got, _ = jax.jit(meshed.apply)(sharded, random_tokens((4, 12)))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("mesh_sizes", [None, dict(fsdp=8)], ids=["alone", "mesh"])
def test_scalar_head_replaces_unembedding(key, mesh_sizes):
    mesh = sharding.make_mesh(**mesh_sizes) if mesh_sizes else None
    model = Model(CONFIGS["llama"], mesh=mesh)
    params = model.init(key)
    reward, reward_params = add_scalar_head(model, params, key=key)
    assert "unembed" not in reward_params and "unembed" in params
    assert jax.tree.structure(reward_params) == jax.tree.structure(
        reward.param_shapes()
    )
    hidden, _ = reward.apply(reward_params, random_tokens())
    assert reward.score(reward_params, hidden).shape == (2, 12)
    with pytest.raises(ValueError, match="scalar head"):
        reward.unembed(reward_params)
    with pytest.raises(ValueError, match="no scalar head"):
        model.score(params, hidden)


@pytest.mark.parametrize("mesh_sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_value_head_reads_the_hidden_states_of_the_policy(mesh_sizes, key):
    mesh = sharding.make_mesh(**mesh_sizes) if mesh_sizes else None
    model = Model(CONFIGS["llama"], mesh=mesh)
    params = model.init(key)
    both, joint = add_value_head(model, params, key=key)
    assert jax.tree.structure(joint) == jax.tree.structure(both.param_shapes())
    assert jax.tree.structure(joint) == jax.tree.structure(both.init(key))
    tokens = random_tokens()
    hidden, _ = both.apply(joint, tokens)
    np.testing.assert_array_equal(hidden, model.apply(params, tokens)[0])
    np.testing.assert_array_equal(both.unembed(joint), model.unembed(params))
    (policy, language), (critic, scored) = split_heads(both, joint)
    assert policy == model and jax.tree.structure(language) == jax.tree.structure(
        params
    )
    assert jax.tree.structure(scored) == jax.tree.structure(critic.param_shapes())
    values = critic.score(scored, critic.apply(scored, tokens)[0])
    np.testing.assert_array_equal(values, both.score(joint, hidden))
    with pytest.raises(ValueError, match="no value head"):
        split_heads(model, params)
    with pytest.raises(ValueError, match="scalar head already"):
        add_value_head(critic, scored, key=key)


def test_bad_arguments_are_refused(key):
    with pytest.raises(ValueError, match="attention"):
        Model(CONFIGS["llama"], attention="flash")
    model = Model(CONFIGS["llama"])
    with pytest.raises(ValueError, match="batch, time"):
        model.apply(model.init(key), jnp.zeros(3, jnp.int32))
