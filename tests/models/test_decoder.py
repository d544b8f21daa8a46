"""Tests for jalign/models/decoder.py: packing, padding, caching, remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import checkpoint_name

from jalign.models import Model, cache as kv
from jalign.models.platform import GPU, PLAIN, PRODUCT, products
from tests.models.rows import packed_rows
from tests.models.tiny import CONFIGS, random_params, random_tokens


@pytest.mark.parametrize("attention", ["plain", "blocked"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_rows_equal_rows_alone_whatever_the_padding(name, attention):
    model = Model(CONFIGS[name], attention=attention)
    params, tokens = random_params(model), random_tokens((1, 14))
    ids, positions = packed_rows([[7, 5]], 14)
    packed, _ = model.apply(params, tokens, positions=positions, segment_ids=ids)
    for start, stop in ((0, 7), (7, 12)):
        alone, _ = model.apply(params, tokens[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=2e-5)
    tokens = tokens.copy()
    tokens[:, 12:] = 3
    other, _ = model.apply(params, tokens, positions=positions, segment_ids=ids)
    np.testing.assert_array_equal(packed[:, :12], other[:, :12])


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
def test_decoding_with_a_cache_equals_one_pass(name, unroll):
    """Right-padded prompts of 5 and 3; then one token at a time, to 9 and 7."""
    model = Model(CONFIGS[name], unroll=unroll)
    params, tokens = random_params(model), random_tokens((2, 9))
    want, _ = model.apply(params, tokens)
    apply, cache = jax.jit(model.apply), model.init_cache(2, 10)
    ids = np.array([[1] * 5, [1] * 3 + [0] * 2])
    prompt = np.where(ids, tokens[:, :5], 0)
    got, cache = apply(params, prompt, segment_ids=ids, cache=cache)
    np.testing.assert_allclose(got[0], want[0, :5], atol=2e-5)
    np.testing.assert_allclose(got[1, :3], want[1, :3], atol=2e-5)
    assert (np.asarray(cache.positions[1, 3:]) == kv.NEVER).all()
    for i in range(4):
        at = np.array([[5 + i], [3 + i]])
        new = np.take_along_axis(tokens, at, 1)
        reader = model.for_decoding(params) if i % 2 else params
        got, cache = apply(reader, new, positions=at, cache=cache)
        for b in range(2):
            np.testing.assert_allclose(got[b, 0], want[b, at[b, 0]], atol=2e-5)


def test_remat_changes_no_gradient():
    model = Model(CONFIGS["qwen3"])
    params, tokens = random_params(model), random_tokens()

    def grads(model):
        loss = jax.jit(jax.grad(lambda p: (model.apply(p, tokens)[0] ** 2).sum()))
        return loss(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        grads(model),
        grads(model.replace(remat=True)),
    )


def test_a_cpu_stores_products_only():
    """As scanned layers do by themselves; the gradient stays the same."""
    model = Model(CONFIGS["llama"])
    params, tokens = random_params(model), random_tokens((4, 192))

    def compiled(model):
        loss = jax.jit(jax.grad(lambda p: (model.apply(p, tokens)[0] ** 2).sum()))
        return loss.lower(params).compile()

    def temporaries(model):
        return compiled(model).memory_analysis().temp_size_in_bytes

    stored = temporaries(model.replace(unroll=True))
    assert temporaries(model) < 0.8 * stored
    assert temporaries(model.replace(remat=True)) < temporaries(model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        compiled(model)(params),
        compiled(model.replace(unroll=True))(params),
    )


def test_the_kernel_of_attention_is_not_recomputed():
    """Its exponentials occur once forward, once backward, for each block of queries."""
    model = Model(CONFIGS["llama"])
    params, tokens = random_params(model), random_tokens((1, 128))
    loss = jax.grad(lambda p: (model.apply(p, tokens)[0] ** 2).sum())
    # And sigmoids, in another form: the jaxpr has them as logistic.
    assert str(jax.make_jaxpr(loss)(params)).count("= exp ") == 2


def test_bfloat16_activations_stay_near_float32():
    model = Model(CONFIGS["llama"])
    params = random_params(model)
    want, _ = model.apply(params, random_tokens())
    got, _ = model.replace(dtype=jnp.bfloat16).apply(params, random_tokens())
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max()
    assert error < 0.05


def test_the_rotation_tables_are_computed_once_for_all_layers():
    model = Model(CONFIGS["llama"])
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    forward = jax.jit(lambda params, tokens: model.apply(params, tokens)[0])
    compiled = forward.lower(model.param_shapes(), tokens).compile()
    assert compiled.as_text().count(" cosine(") == 1


class Named:
    def __init__(self, name):
        self.name = name


def test_the_fused_kernel_of_a_gpu_is_not_run_twice():
    # The policy knows it by its name, which only jax's internals say.
    names = [
        x.name
        for x in vars(fused_attention_stablehlo).values()
        if isinstance(getattr(x, "name", None), str) and "attention_fwd" in x.name
    ]
    assert names and all(products(Named(name)) for name in names)
    assert not products(Named("dot_product_attention_bwd_wrapper"))


def test_products_are_stored_and_elementwise_work_is_done_again():
    def fn(x, w):
        return jnp.sum(jnp.sin(jnp.exp(checkpoint_name(x @ w, PRODUCT))))

    x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
    again = jax.checkpoint(fn, policy=products)
    jaxpr = str(jax.make_jaxpr(jax.grad(again))(x, w))
    assert jaxpr.count(" exp ") > str(jax.make_jaxpr(fn)(x, w)).count(" exp ")
    forward = jaxpr.count("dot_general") - 1  # one of them is the gradient
    assert forward == 1


def test_unrolled_layers_of_a_gpu_store_products_only():
    model = Model(CONFIGS["llama"], attention="plain", unroll=True)
    params, tokens = random_params(model), random_tokens((2, 12))

    def operations(platform):
        there = model.replace(platform=platform)

        def loss(params):
            return (there.apply(params, tokens)[0] ** 2).sum()

        return list(equations(jax.make_jaxpr(jax.grad(loss))(params)))

    def of_weights(operations):  # without batch dimensions: not attention's
        dots = [x for x in operations if x.primitive.name == "dot_general"]
        return sum(not any(x.params["dimension_numbers"][1]) for x in dots)

    def gates(operations):
        return sum(x.primitive.name == "logistic" for x in operations)

    everything, dots = operations(PLAIN), operations(GPU)
    assert of_weights(dots) == of_weights(everything) > 0
    assert gates(dots) == 2 * gates(everything) > 0


def equations(jaxpr):
    """Those of a jaxpr and of all that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(tuple(equation.params.values())):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))
