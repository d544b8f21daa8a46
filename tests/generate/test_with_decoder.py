"""The engine with jalign's own decoder: cache, mesh, processes, a real checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import data, generate, losses, models, sharding
from jalign.generate import decode
from tests import hlo
from tests.sharding import processes

CONFIG = models.ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_window=6,
)
PROMPTS = [[1, 2, 3], [4], list(range(5, 14)), [2, 2]]
N = 6

ZOO = (
    " was a little girl named Lily. She loved to play outside in the park. One day, "
    "she saw a big, red ball. She wanted to play with it, but she didn't want to play "
    "with it."
)


@pytest.fixture(scope="module")
def params():
    # Larger than at the start of training, so that the tokens are not near a tie.
    params = models.Model(CONFIG).init(jax.random.key(0))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)


def sample(model, params, **how):
    how = dict(key=jax.random.key(1), max_new_tokens=N) | how
    return generate.to_host(generate.generate(model, params, PROMPTS, **how))


def rows_of(completion):
    """Prompts and completions as [B, T], the place of the first new token, [B, N]."""
    rows = np.zeros((len(PROMPTS), 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        rows[row, : len(prompt) + N] = [*prompt, *completion.tokens[row]]
    start = np.array([len(prompt) for prompt in PROMPTS])
    return rows, start[:, None] + np.arange(N)[None, :]


def test_a_cache_that_grows_changes_nothing(params, monkeypatch):
    model = models.Model(CONFIG)
    want = sample(model, params)
    loop, grown = decode.decode, []

    def noted(*args, grow, **more):
        grown.append(grow)
        return loop(*args, grow=grow, **more)

    monkeypatch.setattr(decode, "_GROW_FROM", N)
    monkeypatch.setattr(decode, "decode", noted)
    jax.clear_caches()
    got = sample(model, params)
    assert grown == [True]
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logps, want.logps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logps_are_those_of_the_model_without_a_cache(temperature, params):
    model = models.Model(CONFIG)
    completion = sample(model, params, temperature=temperature)
    rows, at = rows_of(completion)
    hidden, _ = model.apply(params, jnp.asarray(rows))
    unembed = model.unembed(params)
    logps = losses.token_logps(
        hidden[:, :-1], unembed, jnp.asarray(rows[:, 1:]), temperature=temperature or 1
    )
    expected = np.take_along_axis(np.asarray(logps), at - 1, axis=1)
    np.testing.assert_allclose(completion.logps, expected, atol=1e-4)
    if temperature == 0:
        best = np.asarray(jnp.argmax(hidden @ unembed, axis=-1))
        chosen = np.take_along_axis(best, at - 1, axis=1)
        np.testing.assert_array_equal(completion.tokens, chosen)


@pytest.mark.parametrize("room", [None, 4 * 40_000])  # copies; cut over tensor
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_a_mesh_changes_nothing(sizes, room, params, monkeypatch):
    plain = sample(models.Model(CONFIG), params, top_p=0.9)
    mesh = sharding.make_mesh(**sizes)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))
    monkeypatch.setattr(sharding, "device_bytes", lambda mesh: room)
    on_mesh = sample(models.Model(CONFIG, mesh=mesh), placed, top_p=0.9)
    np.testing.assert_array_equal(plain.tokens, on_mesh.tokens)
    np.testing.assert_allclose(plain.logps, on_mesh.logps, atol=1e-5)


@pytest.mark.parametrize("room, tensor", [(None, 1), (4 * 40_000, 2)])
def test_no_token_moves_a_weight(room, tensor, params):
    mesh = sharding.make_mesh()
    model, laid_out = models.Model(CONFIG, mesh=mesh).on_decoding_mesh(
        params, 8, 16, room
    )
    assert model.mesh.shape["tensor"] == tensor
    shapes = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        jax.eval_shape(laid_out, params),
        sharding.param_shardings(model.mesh, params),
    )
    program = generate.lower(model, shapes, prompts=8, longest=9, max_new_tokens=N)
    sent = hlo.moved(program.compile().as_text())
    # Weights would be gathered; what products of cut kernels leave is added up.
    gathered = [size for kind, size in sent if kind != "all-reduce"]
    smallest = min(x.size for x in jax.tree.leaves(shapes) if x.ndim > 2)
    assert (
        sent and max(gathered, default=0) <= 8 * max(N, CONFIG.num_heads) < smallest / 8
    )


def _generate_on_all_processes():
    from jalign import generate, models

    config = models.ModelConfig(32, 32, 48, 1, 4, 2, 8)
    mesh = None if sharding.process_slice()[1] == 1 else sharding.make_mesh()
    model = models.Model(config, mesh=mesh)
    params = model.init(jax.random.key(0))
    completion = generate.generate(
        model,
        params,
        [[1, 2], [3], [4, 5, 6]],
        key=jax.random.key(1),
        max_new_tokens=5,
        top_k=20,
        stop_tokens=[9, 10],
    )
    host = generate.to_host(completion)
    return [host.tokens.tolist(), host.mask.tolist()]


def test_two_processes_give_what_one_gives():
    first, second = processes.run(_generate_on_all_processes, devices=2)
    assert first == second == _generate_on_all_processes()


def test_greedy_text_of_a_real_checkpoint(real_data):
    path = real_data / "stories260k"
    model, params = models.load(str(path))
    tokenizer = data.load_tokenizer(path)
    prompt = tokenizer("Zoo")["input_ids"]
    completion = generate.generate(
        model, params, [prompt], key=jax.random.key(0), max_new_tokens=64, temperature=0
    )
    (ids,) = generate.completion_lists(completion)
    text = generate.continuation(tokenizer, list(prompt), ids)
    assert text.startswith(ZOO)
