"""Every parameter's gradient on a mesh beside one device's, and forward mode."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses, sharding
from jalign.models import Model
from jalign.models.layers import Embedding
from tests.models.tiny import CONFIGS, random_params, random_tokens

OPTIONS = {"xla_backend_optimization_level": 0}  # little is computed, much compiled
TOKENS = random_tokens((8, 64))
TOKENS[:, ::2] = 7  # one id in half of the places
WEIGHTS = np.random.default_rng(1).normal(1.0, 1.0, (8, 63)).astype(np.float32)
CASES = {
    "biases": (CONFIGS["qwen2"], dict(fsdp=8), False),
    "tied": (CONFIGS["llama3"], dict(fsdp=4, tensor=2), True),
    "head": (CONFIGS["reward"], dict(data=2, fsdp=2, tensor=2), False),
}


def loss(params, model):
    hidden, _ = model.apply(params, TOKENS[:, :-1])
    if model.has_scalar_head:
        return jnp.sum(WEIGHTS * model.score(params, hidden))
    logps = losses.token_logps(
        hidden, model.unembed(params), TOKENS[:, 1:], chunk_size=128
    )
    return jnp.sum(WEIGHTS * logps)


def gradients(model, params):
    if model.mesh is not None:
        where = sharding.param_shardings(model.mesh, params)
        params = jax.device_put(params, where)
    grad = jax.grad(functools.partial(loss, model=model))
    return jax.device_get(jax.jit(grad, compiler_options=OPTIONS)(params))


def errors(got, want):
    """Relative error of each leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.linalg.norm(x - y)
        / np.linalg.norm(y)
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(got),
            jax.tree.leaves(want),
            strict=True,
        )
    }


@pytest.mark.parametrize("name", CASES)
def test_gradients_on_a_mesh_are_those_of_one_device(name):
    config, sizes, remat = CASES[name]
    alone = Model(config, remat=remat)
    params = jax.tree.map(lambda x: 0.3 * x, random_params(alone))
    meshed = alone.replace(mesh=sharding.make_mesh(**sizes))
    exact = gradients(alone, params)
    for path, error in errors(gradients(meshed, params), exact).items():
        assert error < 1e-5, path
    own, on_mesh = (
        errors(gradients(m.replace(dtype=jnp.bfloat16), params), exact)
        for m in (alone, meshed)
    )
    for path, error in on_mesh.items():
        assert error < 1.6 * own[path], path
    assert np.mean([*on_mesh.values()]) < 1.2 * np.mean([*own.values()])


@pytest.mark.parametrize("num_tokens", [2048, 32])
def test_a_frequent_token_adds_up_in_float32_on_a_mesh(num_tokens):
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    embedding = Embedding(64, 8, jnp.bfloat16, mesh)
    tokens = np.full((4, num_tokens // 4), 5)
    table = np.ones((64, 8), np.float32)

    def total(table, dtype):
        rows = embedding.apply({"params": {"embedding": table.astype(dtype)}}, tokens)
        return jnp.sum(rows, dtype=jnp.float32)  # pyright: ignore

    for dtype in (jnp.float32, jnp.bfloat16):
        grad = jax.jit(jax.grad(total), static_argnums=1)(table, dtype)
        assert grad[5, 0] == num_tokens and np.sum(grad) == 8 * num_tokens


def test_forward_mode_goes_through_a_plain_model():
    model = Model(CONFIGS["qwen2"], attention="plain")
    params, along = random_params(model), random_params(model, seed=1)

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def both(params, along):
        grad = jax.grad(functools.partial(loss, model=model))
        value, moved = jax.jvp(lambda p: loss(p, model), (params,), (along,))
        return value, moved, *jax.jvp(grad, (params,), (along,))

    value, moved, grads, curved = both(params, along)
    want = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(along)))
    np.testing.assert_allclose(moved, want, rtol=1e-4)
    assert value == jax.jit(loss, static_argnums=1)(params, model)
    assert all(np.isfinite(x).all() and np.any(x) for x in jax.tree.leaves(curved))


@pytest.mark.parametrize(("features", "members"), [(16, 8), (512, 4)])
def test_no_device_is_sent_the_embedding_or_all_of_its_gradient(features, members):
    """The rows are exchanged; of the table, the features of a group's member at most,
    which are none where the group is the whole mesh."""
    mesh, vocab = sharding.make_mesh(fsdp=8), 256
    table = np.random.default_rng(0).normal(size=(vocab, features)).astype(np.float32)
    where = sharding.param_shardings(mesh, {"embed": {"embedding": table}})
    rows = sharding.batch_sharding(mesh)

    def total(table, tokens, weights):
        embedding = Embedding(vocab, features, jnp.bfloat16, mesh)
        x = embedding.apply({"params": {"embedding": table}}, tokens)
        return jnp.sum((x * weights).astype(jnp.float32))

    weights = np.ones((*TOKENS.shape, features), jnp.bfloat16)
    places = *where["embed"].values(), rows, rows
    args = jax.device_put((table, TOKENS, weights), places)
    step = jax.jit(jax.value_and_grad(total)).lower(*args).compile()
    most = TOKENS.size * features // 8  # of a device's rows
    if members < 8:
        most = max(most, vocab * features // members)
    for line in step.as_text().splitlines():
        found = re.search(r"= (.*) (all-[\w-]+|collective-permute)(-start)?\(", line)
        for dims in re.findall(r"f32\[([\d,]+)\]", found[1] if found else ""):
            assert np.prod([int(n) for n in dims.split(",")]) <= most, line
    value, gradient = step(*args)
    np.testing.assert_array_equal(gradient[7], np.sum(TOKENS == 7))
    want = table.astype(jnp.bfloat16).astype(np.float32)[TOKENS].sum()
    np.testing.assert_allclose(value, want, rtol=1e-5)
