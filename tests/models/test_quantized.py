"""Tests for jalign/models/quantized.py: a model whose kernels are codes."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models import Model, lora, quantized, save
from jalign.models.platform import PLAIN
from jalign.train.integrity import tree_digest
from tests.models.tiny import CONFIGS, random_tokens
from tests.tolerance import assert_trees_close

SIZES = dict(hidden_size=128, intermediate_size=192, head_dim=32)
MODEL = Model(dataclasses.replace(CONFIGS["qwen2"], **SIZES))
TOKENS = random_tokens((8, 12))


def normal(shapes, seed: int, std: float):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, std, x.shape).astype("f4"), shapes)


@functools.cache
def floats():
    return normal(MODEL.param_shapes(), 0, 0.1)


@functools.cache
def some_adapters():
    """Not fresh ones: their B is 0, and then A has no gradient."""
    fresh = functools.partial(lora.init, MODEL, floats(), lora.LoraConfig(rank=4))
    return normal(jax.eval_shape(fresh, jax.random.key(1)), 1, 0.1)


@functools.cache
def coded(method: str):
    return jax.jit(quantized.quantize_params, static_argnums=1)(floats(), method)


def loss(model: Model, tokens, adapters, embed, base):
    """Of hidden states; its gradient by the embedding is that of x, all the way."""
    params = lora.join(base | {"embed": embed}, adapters)
    hidden, _ = model.apply(params, tokens)
    weights = jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)
    return (hidden.astype(jnp.float32) * weights).sum()


def gradients(model: Model, adapters, base):
    """(loss, (of what is trained, of the embedding))."""
    trained, scales = lora.trainable(adapters)

    def of(trained, embed):
        return loss(model, TOKENS, lora.join(scales, trained), embed, base)

    both = jax.value_and_grad(of, argnums=(0, 1))
    return jax.jit(both)(trained, base["embed"])


@functools.cache
def wanted(method: str):
    """The gradients with kernels of floats that are what the codes mean."""
    base = coded(method)
    whole = quantized.dequantize_params(base, MODEL.param_shapes())
    return gradients(MODEL, some_adapters(), whole)


@pytest.mark.parametrize(
    "method, how",
    [
        ("nf4", {}),
        ("int8", {}),
        ("int8", dict(remat=True)),
        ("int8", dict(unroll=True)),
    ],
    ids=str,
)
def test_gradients_are_those_of_dequantized_kernels(method, how):
    """Of A, B and x: sums of about a hundred terms, a few of them deep."""
    got = gradients(MODEL.replace(**how), some_adapters(), coded(method))
    assert_trees_close(got, wanted(method), n=32)


def test_products_are_of_the_activations_dtype():
    model, params = MODEL.replace(dtype=jnp.bfloat16), coded("int8")
    whole = quantized.dequantize_params(params, MODEL.param_shapes(), jnp.bfloat16)
    apply = jax.jit(lambda params: model.apply(params, TOKENS)[0])
    got, want = (apply(p).astype(jnp.float32) for p in (params, whole))
    np.testing.assert_allclose(got, want, atol=0.1)  # a few bfloat16 steps at 4
    assert apply(params).dtype == jnp.bfloat16


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_backward_pass_keeps_no_kernels(method):
    """Neither stored by the scan, nor constants of their size, nor gradients."""
    sizes = dict(num_layers=16, hidden_size=256, intermediate_size=512)
    # PLAIN stores all that the backward pass asks for, as a TPU does.
    model = Model(dataclasses.replace(MODEL.config, **sizes), platform=PLAIN)
    shapes = model.param_shapes()
    base = jax.eval_shape(
        functools.partial(quantized.quantize_params, method=method), shapes
    )
    config = lora.LoraConfig(rank=2)
    adapters = jax.eval_shape(
        lambda key: lora.init(model, shapes, config, key), jax.random.key(0)
    )
    step = jax.jit(jax.grad(functools.partial(loss, model, TOKENS[:1, :4])))
    compiled = step.lower(adapters, shapes["embed"], base).compile()
    kernels = [x for x in jax.tree.leaves(shapes["layers"]) if x.size > 2**14]
    stack = sum(x.size * 4 for x in kernels)
    # Three layers' worth: the kernel at hand, and what is computed on the way to it.
    assert compiled.memory_analysis().temp_size_in_bytes < stack * 3 / 16
    text = compiled.as_text()
    for kernel in kernels:
        assert f"f32[{','.join(map(str, kernel.shape))}]" not in text


@pytest.mark.parametrize(
    "method, sizes", [("nf4", dict(data=1, fsdp=2, tensor=4)), ("int8", dict(fsdp=4))]
)
def test_what_a_mesh_gathers_are_codes(method, sizes):
    """tensor=4 divides neither the 2 key heads nor the 3 blocks of the MLP."""
    mesh = sharding.make_mesh(
        **sizes, devices=jax.devices()[: math.prod(sizes.values())]
    )

    def put(tree):
        return jax.device_put(tree, sharding.param_shardings(mesh, tree))

    args = put(some_adapters()), put(coded(method))
    step = jax.jit(functools.partial(gradients, MODEL.replace(mesh=mesh)))
    compiled = step.lower(*args).compile()
    gathered = re.findall(r"(\w+)\[([\d,]+)\]\S* all-gather", compiled.as_text())
    sizes_of = [(dtype, math.prod(map(int, d.split(",")))) for dtype, d in gathered]
    assert max(n for d, n in sizes_of if d in ("u8", "s8")) >= 128 * 128 // 2
    # The smallest kernels, k and v, have 128 x 64 entries; embed has 48 x 128.
    assert max(n for d, n in sizes_of if d not in ("u8", "s8")) < 128 * 64
    got = jax.device_get(compiled(*args))
    assert_trees_close(got, jax.device_get(wanted(method)), n=128)
    assert tree_digest(args[1]) == tree_digest(jax.tree.map(jnp.asarray, coded(method)))


def test_blocks_are_cut_where_they_divide_and_whole_elsewhere():
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    shapes = jax.eval_shape(
        functools.partial(quantized.quantize_params, method="nf4"),
        MODEL.param_shapes(),
    )
    cuts = sharding.param_shardings(mesh, shapes)["layers"]
    spec = {
        name: tuple(part["kernel"]["nf4"].spec)
        for name, part in (cuts["attention"] | cuts["mlp"]).items()
        if "kernel" in part
    }
    assert spec["q"] == (None, "fsdp", None, "tensor", None)
    assert spec["k"] == (None, "fsdp", None, None, None)  # 2 heads
    assert spec["o"] == (None, None, None, "fsdp")  # 2 blocks
    assert spec["down"] == (None, None, None, "fsdp")  # 3 blocks
    assert spec["gate"] == (None, "fsdp", None, "tensor")
    absmax = cuts["mlp"]["gate"]["kernel"]["absmax"]
    assert tuple(absmax.spec) == (None, "fsdp", "tensor")
    strange = {"layers": {"mlp": {"up": {"kernel": {"fp4": jnp.ones((2, 3, 4))}}}}}
    with pytest.raises(ValueError, match="kernel/fp4.*no sharding rule"):
        sharding.param_shardings(mesh, strange)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_decoding_keeps_the_codes(method):
    params = coded(method)
    ready = MODEL.replace(dtype=jnp.bfloat16).for_decoding(params)
    layer = ready["layers_1"]["mlp"]["up"]["kernel"]
    for name, x in params["layers"]["mlp"]["up"]["kernel"].items():
        assert layer[name].dtype == x.dtype
        np.testing.assert_array_equal(layer[name], x[1])


def test_decoding_gives_the_same():
    params = lora.join(coded("int8"), some_adapters())
    want = jax.jit(lambda p: MODEL.apply(p, TOKENS)[0])(params)
    ready, cache = MODEL.for_decoding(params), MODEL.init_cache(8, 12)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), (8, 12))
    step = jax.jit(
        lambda t, at, cache: MODEL.apply(ready, t, positions=at, cache=cache)
    )
    for i in range(3):
        one = slice(i, i + 1)
        got, cache = step(TOKENS[:, one], places[:, one], cache)
        np.testing.assert_allclose(got[:, 0], want[:, i], atol=1e-4)


def test_what_stays_as_it_is():
    params, base = coded("nf4"), floats()
    assert quantized.is_quantized(params) and not quantized.is_quantized(base)
    parts = params["layers"]["attention"] | params["layers"]["mlp"]
    assert len(parts) == 7 and all("nf4" in part["kernel"] for part in parts.values())
    assert set(parts["q"]) == {"kernel", "bias"}
    for name in ("embed", "norm", "unembed"):
        jax.tree.map(np.testing.assert_array_equal, params[name], base[name])
    whole = quantized.dequantize_params(params, MODEL.param_shapes(), jnp.bfloat16)
    up, want = whole["layers"]["mlp"]["up"]["kernel"], base["layers"]["mlp"]["up"]
    assert up.dtype == jnp.bfloat16
    error = up.astype(jnp.float32) - want["kernel"]
    assert 0.08 < float(jnp.std(error) / jnp.std(want["kernel"])) < 0.10


def test_neither_saved_nor_merged(tmp_path):
    with pytest.raises(ValueError, match="quantized.*save the adapters"):
        save(tmp_path / "out", MODEL, coded("nf4"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="quantized.*full-precision"):
        lora.merge(lora.join(coded("int8"), some_adapters()))
