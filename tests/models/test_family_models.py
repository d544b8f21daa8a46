"""Every switch of a config, in a whole model: how it is run changes no number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import forward, sharding
from jalign.models import Model, lora, quantized
from jalign.models.config import LayerKind
from jalign.models.lora import LoraConfig
from jalign.types import TokenBatch
from tests.models.adapters import random_adapters
from tests.models.rows import packed_rows
from tests.models.tiny import (
    FAMILY_CONFIGS,
    LONGROPE,
    random_params,
    random_tokens,
    shapes_of,
)

OPTIONS = {"xla_backend_optimization_level": 0}  # little is computed, much compiled
LENGTHS = [[9, 3], [5, 6], [12], [4, 7]]
TOKENS = random_tokens((4, 12))
WEIGHTS = np.random.default_rng(1).normal(1.0, 1.0, (4, 12)).astype(np.float32)


def mixed(name, **changes):
    return dataclasses.replace(FAMILY_CONFIGS[name], **changes)


# Switches of several families in one config, where they do not touch each other: so
# there is less to compile.
MODELS = {
    "opt": mixed("opt"),
    "bloom, mpt": mixed("mpt", qkv_layout="groups", qkv_bias=True, embed_norm=True),
    "gpt_neox, gptj": mixed(
        *("gptj",), qkv_layout="groups", parallel_norms=2, num_kv_heads=2
    ),
    "gemma2, gemma3": mixed("gemma3_text", attention_softcap=5.0),
    "phi3, granite, smollm3": mixed(
        *("phi3",),
        layer_kinds=(LayerKind(5), LayerKind(None, "none")),
        **dict(embed_scale=3.0, query_scale=0.2, residual_scale=0.5, logit_scale=0.25),
    ),
    "olmo2, qwen2_moe": mixed("qwen2_moe", norm_place="post", qk_norm="whole"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def batch_of(tokens, lengths) -> TokenBatch:
    """All tokens but the first of each document are trained."""
    ids, positions = packed_rows(lengths, tokens.shape[1])
    return TokenBatch(tokens, (positions > 0) & (ids > 0), ids, positions)


PACKED = batch_of(TOKENS, LENGTHS)
# The same documents, each in a row of its own; what is behind them is of no account.
PLACES = [
    (row, start, size)
    for row, sizes in enumerate(LENGTHS)
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False)
]
APART = np.full((len(PLACES), 12), 7, np.int32)
for document, (row, start, size) in zip(APART, PLACES, strict=True):
    document[:size] = TOKENS[row, start : start + size]
ALONE = batch_of(APART, [[size] for *_, size in PLACES])


def params_of(model):
    return jax.tree.map(lambda x: 0.3 * x, random_params(model))


def gradients(model, params):
    """(log-probabilities of PACKED [4, 12], gradient of their weighted sum)."""

    def loss(params):
        logps = forward.token_logps(model, params, PACKED)
        return jnp.sum(WEIGHTS * logps), logps

    if model.mesh is not None:
        where = sharding.param_shardings(model.mesh, params)
        params = jax.device_put(params, where)
    grad = jax.jit(jax.grad(loss, has_aux=True), compiler_options=OPTIONS)
    grads, logps = jax.device_get(grad(params))
    return logps, grads


@functools.cache
def definition(name):
    """Of unrolled layers with plain attention, on one device."""
    model = Model(MODELS[name], attention="plain", unroll=True)
    return gradients(model, params_of(model))


@every_model
def test_scanned_blocked_recomputed_layers_on_a_mesh_are_the_plain_ones(name):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    how = dict(attention="blocked", remat=True, unroll=False)
    model = Model(MODELS[name], mesh=mesh, **how)
    logps, grads = gradients(model, params_of(model))
    want_logps, want = definition(name)
    np.testing.assert_allclose(logps, want_logps, rtol=1e-5, atol=1e-5)
    # The true gradient of a bias of keys is 0: a softmax is the same without it.
    rounding = 1e-3 * max(np.linalg.norm(x) for x in jax.tree.leaves(want))
    for (path, x), y in zip(
        jax.tree.leaves_with_path(want), jax.tree.leaves(grads), strict=True
    ):
        error = np.linalg.norm(y - x) / max(np.linalg.norm(x), rounding)
        assert error < 1e-5, (jax.tree_util.keystr(path), error)


@every_model
def test_packed_documents_are_those_alone_whatever_is_behind_them(name):
    model = Model(MODELS[name], attention="plain")
    logps = jax.jit(forward.token_logps, static_argnums=0, compiler_options=OPTIONS)
    alone = logps(model, params_of(model), ALONE)
    packed, _ = definition(name)
    for got, (row, start, size) in zip(alone, PLACES, strict=True):
        want = packed[row, start : start + size]
        np.testing.assert_allclose(got[:size], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "unroll"), [*((name, False) for name in MODELS), ("gemma2, gemma3", True)]
)
def test_decoding_with_a_cache_equals_one_pass(name, unroll):
    """Right-padded prompts of 7 and 4; then one token at a time, to 9 and 6."""
    config = MODELS[name]
    if (
        config.rope_scaling == LONGROPE
    ):  # cached keys keep longrope's factors of their time
        config = dataclasses.replace(config, rope_scaling=None)
    model = Model(config, unroll=unroll)
    params, tokens = params_of(model), TOKENS[:2, :9]
    one_pass = jax.jit(model.replace(unroll=not unroll).apply, compiler_options=OPTIONS)
    want, _ = one_pass(params, tokens)
    apply = jax.jit(model.apply, compiler_options=OPTIONS)
    cache, lengths = model.init_cache(2, 10), np.array([7, 4])
    ids = (np.arange(7) < lengths[:, None]).astype(np.int32)
    got, cache = apply(params, tokens[:, :7] * ids, segment_ids=ids, cache=cache)
    np.testing.assert_allclose(got[ids > 0], want[:, :7][ids > 0], atol=2e-5)
    for step in range(2):
        at = (lengths + step)[:, None].astype(np.int32)
        new = np.take_along_axis(tokens, at, 1)
        got, cache = apply(params, new, positions=at, cache=cache)
        last = want[np.arange(2), at[:, 0]]
        np.testing.assert_allclose(got[:, 0], last, atol=2e-5)


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_attention_and_mlp_are_all_that_adapters_take(name):
    model = Model(FAMILY_CONFIGS[name])

    def modules(target):
        return lora.targeted(model, LoraConfig(targets=(target,))).keys()

    if name == "mixtral":  # all of its MLPs are experts, which have no adapters
        with pytest.raises(ValueError, match="'mlp'"):
            modules("mlp")
        assert modules("attention") == modules("all")
    else:
        assert modules("attention") | modules("mlp") == modules("all")
        assert not modules("attention") & modules("mlp")


@pytest.mark.parametrize("name", ["gpt_neox", "phi3"])
def test_adapters_of_fused_kernels_are_what_merging_adds(name):
    model = Model(FAMILY_CONFIGS[name], attention="plain", unroll=True)
    params, tokens = params_of(model), TOKENS[:1]
    adapted = lora.join(params, random_adapters(model, LoraConfig(2, 1.0)))
    got, _ = model.apply(adapted, tokens)
    want, _ = model.apply(lora.merge(adapted), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert abs(got - model.apply(params, tokens)[0]).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["opt", "bloom", "mpt", "phi3", "qwen2_moe", "mixtral"]
)
def test_every_linear_kernel_of_a_layer_is_quantized(name):
    model = Model(FAMILY_CONFIGS[name])
    shapes = shapes_of(model)
    nf4 = functools.partial(quantized.quantize_params, method="nf4")
    coded = jax.eval_shape(nf4, shapes)
    assert quantized.is_quantized(coded)
    back = jax.eval_shape(quantized.dequantize_params, coded, shapes)
    assert jax.tree.map(lambda x: x.shape, back) == jax.tree.map(
        lambda x: x.shape, shapes
    )
    for row in lora.kernels(model).values():
        kernel = functools.reduce(dict.__getitem__, row.path.split("/"), coded)
        assert set(kernel) >= {"nf4", "absmax"}
    hidden, _ = jax.eval_shape(model.apply, coded, TOKENS)
    assert hidden.shape == (4, 12, model.config.head_width)
