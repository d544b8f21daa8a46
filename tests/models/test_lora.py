"""jalign/models/lora.py against float64 products, PEFT's rules and published counts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import models, sharding
from jalign.models import Model, ModelConfig, lora
from jalign.models.lora import LoraConfig

CONFIG = ModelConfig(
    vocab_size=62,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    qkv_bias=True,
    qk_norm=True,
)
TOKENS = jax.random.randint(jax.random.key(7), (2, 9), 0, 62)


def shaken(adapters, std=0.2):
    """With a B that is not zero."""

    def noise(path, x):
        if path[-1].key == lora.SCALE:
            return x
        own = jax.random.fold_in(jax.random.key(3), len(str(path)) + x.size)
        return x + std * jax.random.normal(own, x.shape)

    return jax.tree_util.tree_map_with_path(noise, adapters)


@pytest.fixture(scope="module")
def base():
    model = Model(CONFIG)
    return model, model.init(jax.random.key(0))


def hidden(model, params):
    return jax.jit(model.apply)(params, TOKENS)[0]


def test_an_adapted_projection_is_the_closed_form(base):
    """q and o of one layer, by float64 products."""
    model, params = base
    adapters = shaken(lora.init(model, params, LoraConfig(4, 6.0), jax.random.key(1)))
    merged = lora.merge(lora.join(params, adapters))["layers"]["attention"]
    for name, inputs in {"q": 1, "o": 2}.items():
        kernel = np.asarray(params["layers"]["attention"][name]["kernel"], np.float64)
        leaves = adapters["layers"]["attention"][name]
        a, b = (np.asarray(leaves[n], np.float64) for n in (lora.A, lora.B))
        for layer in range(3):
            flat = a[layer].reshape(-1, 4) @ b[layer].reshape(4, -1)
            want = kernel[layer] + 6.0 / 4 * flat.reshape(kernel[layer].shape)
            np.testing.assert_allclose(merged[name]["kernel"][layer], want, atol=1e-6)
            assert a[layer].ndim == inputs + 1


@pytest.mark.parametrize("how", [{}, {"remat": True}, {"unroll": True}])
def test_the_forward_pass_adds_what_merging_adds(base, how):
    model, params = base
    model = model.replace(**how)
    fresh = lora.init(model, params, LoraConfig(4), jax.random.key(1))
    # The same but for the order of additions, which other fusions may change.
    start = hidden(model, lora.join(params, fresh))
    np.testing.assert_allclose(start, hidden(model, params), atol=2e-6)
    adapted = lora.join(params, shaken(fresh))
    want = hidden(model, lora.merge(adapted))
    np.testing.assert_allclose(hidden(model, adapted), want, atol=3e-5)
    assert float(jnp.abs(want - start).max()) > 0.1


def test_in_bfloat16_fresh_adapters_change_no_bit(base):
    model, params = base
    model = model.replace(dtype=jnp.bfloat16)
    fresh = lora.init(model, params, LoraConfig(4), jax.random.key(1))
    assert (hidden(model, lora.join(params, fresh)) == hidden(model, params)).all()


def test_gradients_are_those_of_the_merged_kernels(base):
    """d loss / dB = s A^T dW, d loss / dA = s dW B^T; the base needs none."""
    model, params = base
    adapters = shaken(lora.init(model, params, LoraConfig(4, 6.0), jax.random.key(1)))
    trained, scales = lora.trainable(adapters)
    frozen = lora.join(params, scales)

    def loss(params):
        return jnp.sum(jnp.sin(model.apply(params, TOKENS)[0]))

    found = jax.jit(jax.grad(lambda t: loss(lora.join(frozen, t))))(trained)
    full = jax.jit(jax.grad(loss))(lora.merge(lora.join(params, adapters)))
    for room, name in (("attention", "k"), ("attention", "o"), ("mlp", "down")):
        dw = np.asarray(full["layers"][room][name]["kernel"], np.float64)
        leaves, grads = adapters["layers"][room][name], found["layers"][room][name]
        a, b = (np.asarray(leaves[n], np.float64) for n in (lora.A, lora.B))
        for layer in range(3):
            flat_a, flat_b = a[layer].reshape(-1, 4), b[layer].reshape(4, -1)
            dw_flat = dw[layer].reshape(len(flat_a), -1)
            want_a, want_b = dw_flat @ flat_b.T * 1.5, flat_a.T @ dw_flat * 1.5
            for want, got in ((want_a, grads[lora.A]), (want_b, grads[lora.B])):
                got = np.asarray(got[layer]).reshape(want.shape)
                np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def test_unmerge_takes_off_what_merge_has_added(base):
    model, params = base
    adapters = shaken(lora.init(model, params, LoraConfig(4), jax.random.key(1)))
    back = lora.unmerge(lora.merge(lora.join(params, adapters)), adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), back, params)
    kept, same = lora.split(lora.join(params, adapters))
    assert all(map(lambda x, y: x is y, jax.tree.leaves(kept), jax.tree.leaves(params)))
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, same, adapters))
    # A base in bfloat16 is rounded once, from float32.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = lora.merge(lora.join(half, adapters))
    full = lora.merge(
        lora.join(jax.tree.map(lambda x: x.astype(float), half), adapters)
    )
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), full)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), merged, wanted))


def test_a_starts_as_peft_draws_it(base):
    """Uniform within 1 / sqrt(inputs), variance 1 / (3 inputs); for o: heads * H."""
    model, params = base
    adapters = lora.init(model, params, LoraConfig(64), jax.random.key(1))["layers"]
    for name, inputs in {"q": 32, "o": 24}.items():
        a = adapters["attention"][name][lora.A]
        assert abs(a).max() <= 1 / math.sqrt(inputs)
        np.testing.assert_allclose(float(a.var()), 1 / (3 * inputs), rtol=0.1)
        assert not adapters["attention"][name][lora.B].any()
    first, second = adapters["attention"]["q"][lora.A][:2]
    assert (first != second).all()


def test_ranks_and_alphas_by_pattern(base):
    """The first pattern that matches counts; rank and alpha are looked up apart."""
    model, params = base
    config = LoraConfig(
        rank=4,
        alpha=8.0,
        targets=("q_proj", "mlp"),
        rank_pattern=(("layers.1.self_attn.q_proj", 2), ("q_proj", 3)),
        alpha_pattern=(("down_proj", 16.0), ("layers.0.*", 1.0)),
    )
    adapters = lora.init(model, params, config, jax.random.key(1))["layers"]
    assert set(adapters) == {"attention", "mlp"} and set(adapters["attention"]) == {"q"}
    q = adapters["attention"]["q"]
    used = [int((abs(q[lora.A][i]).sum(0) > 0).sum()) for i in range(3)]
    assert used == [3, 2, 3]
    np.testing.assert_allclose(q[lora.SCALE], [1 / 3, 8 / 2, 8 / 3], rtol=1e-6)
    np.testing.assert_allclose(adapters["mlp"]["down"][lora.SCALE], [4, 4, 4])
    np.testing.assert_allclose(adapters["mlp"]["up"][lora.SCALE], [1 / 4, 2, 2])
    root = LoraConfig(rank=4, alpha=8.0, rank_stabilized=True)
    scales = lora.init(model, params, root, jax.random.key(1))["layers"]["mlp"]["up"]
    np.testing.assert_allclose(scales[lora.SCALE], 4.0)


def test_what_a_smaller_rank_leaves_at_zero_stays_zero(base):
    model, params = base
    config = LoraConfig(rank=4, rank_pattern=(("layers.1.*", 2),))
    trained, scales = lora.trainable(
        lora.init(model, params, config, jax.random.key(1))
    )

    def loss(t):
        tree = lora.join(lora.join(params, scales), t)
        return jnp.sum(jnp.sin(model.apply(tree, TOKENS)[0]))

    grads = jax.jit(jax.grad(loss))(trained)["layers"]["mlp"]["gate"]
    assert not grads[lora.A][1, :, 2:].any() and not grads[lora.B][1, 2:].any()
    assert grads[lora.B][1, :2].any() and grads[lora.B][0, 2:].any()


def test_counts_are_the_published_ones():
    """Per rank of an 8B: attention 851,968, MLP 1,769,472 (tinker-cookbook)."""
    config = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128)
    model = Model(config)
    shapes = model.param_shapes()
    for targets, count in {"attention": 851_968, "mlp": 1_769_472}.items():
        chosen = LoraConfig(rank=1, targets=(targets,))
        adapters = jax.eval_shape(
            lambda key, chosen=chosen: lora.init(model, shapes, chosen, key),
            jax.random.key(0),
        )
        assert lora.num_parameters(adapters) == count


def test_dropout_is_of_the_adapters_input_alone(base):
    model, params = base
    fresh = lora.init(model, params, LoraConfig(4), jax.random.key(1))
    adapted = lora.join(params, shaken(fresh))

    def dropped(model, params, key, rate=0.5):
        return hidden(model, lora.with_dropout(params, key, rate))

    one, two = map(jax.random.key, (0, 1))
    # Nothing of the base is dropped: while B is 0 nothing changes.
    start = dropped(model, lora.join(params, fresh), one)
    np.testing.assert_allclose(start, hidden(model, params), atol=2e-6)
    np.testing.assert_allclose(
        dropped(model, adapted, one, 0.0), hidden(model, adapted), atol=1e-5
    )
    first = dropped(model, adapted, one)
    np.testing.assert_allclose(
        first, dropped(model.replace(remat=True), adapted, one), atol=1e-5
    )
    assert float(jnp.abs(first - dropped(model, adapted, two)).max()) > 0.01
    # On the mean it is what it is without: of one layer, where all is linear.
    q = {"kernel": adapted["layers"]["attention"]["q"]["kernel"][0]}
    leaves = {n: x[0] for n, x in adapted["layers"]["attention"]["q"].items()}
    x = jax.random.normal(one, (1, 2, 32))
    from jalign.models.layers import Projection

    layer = Projection("btd,dnh->btnh", (32, 4, 6))

    def drawn(seed):
        extra = {"lora_seed": seed, "lora_rate": jnp.float32(0.5)}
        given = q | {k: v for k, v in leaves.items() if k != "bias"} | extra
        return layer.apply({"params": given}, x)

    draws = jax.jit(jax.vmap(drawn))(jnp.arange(4000, dtype=jnp.uint32))
    given = q | {k: v for k, v in leaves.items() if k != "bias"}
    want = layer.apply({"params": given}, x)
    error = 5 * draws.std(0) / math.sqrt(4000)
    assert (jnp.abs(draws.mean(0) - want) <= error + 1e-5).all()


def test_heads_and_embeddings_may_be_trained_in_full(base):
    model, params = base
    config = LoraConfig(4, train_full=("embed", "head"))
    adapters = lora.init(model, params, config, jax.random.key(1))
    assert set(adapters) == {"layers", "embed", "unembed"}
    joined = lora.join(params, adapters | {"embed": {"embedding": 0}})
    assert joined["embed"]["embedding"] == 0 and joined["norm"] is params["norm"]
    scored, own = models.add_scalar_head(model, params, key=jax.random.key(2))
    assert "score" in lora.init(scored, own, LoraConfig(4), jax.random.key(1))
    tied = Model(ModelConfig(61, 32, 48, 1, 4, 2, 6, tie_embeddings=True))
    with pytest.raises(ValueError, match="name embed"):
        own = tied.init(jax.random.key(0))
        lora.init(tied, own, LoraConfig(train_full=("head",)), jax.random.key(1))


def test_on_a_mesh_the_adapters_are_cut_as_their_kernels(base):
    model, params = base
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    placed = model.replace(mesh=mesh)
    key, config = jax.random.key(1), LoraConfig(4)
    adapters = lora.init(placed, placed.init(jax.random.key(0)), config, key)
    here = lora.init(model, params, config, key)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), adapters, here))
    q, o = (adapters["layers"]["attention"][name] for name in "qo")
    shard = {name: x.addressable_shards[0].data.shape for name, x in q.items()}
    assert shard == {lora.A: (3, 8, 4), lora.B: (3, 4, 2, 6), lora.SCALE: (3,)}
    assert o[lora.A].addressable_shards[0].data.shape == (3, 2, 6, 4)
    assert o[lora.B].addressable_shards[0].data.shape == (3, 4, 8)
    whole = lora.join(placed.init(jax.random.key(0)), shaken(adapters))
    tokens = jnp.tile(TOKENS, (2, 1))
    got = jax.jit(placed.apply)(whole, tokens)[0]
    want = jax.jit(model.apply)(lora.join(params, shaken(here)), tokens)[0]
    np.testing.assert_allclose(got, want, atol=3e-5)


def test_decoding_reads_adapters_as_training_does(base):
    from jalign import generate

    model, params = base
    adapters = lora.init(model, params, LoraConfig(4), jax.random.key(1))
    adapted = lora.join(params, shaken(adapters))
    how = dict(key=jax.random.key(0), max_new_tokens=6, temperature=0.0)
    got, want = (
        generate.generate(model, p, [[1, 2, 3]], **how)
        for p in (adapted, lora.merge(adapted))
    )
    assert (got.tokens == want.tokens).all()
    np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
    cast = model.replace(dtype=jnp.bfloat16).for_decoding(adapted)
    leaf = jax.tree.leaves(cast["layers_0"]["attention"]["q"][lora.SCALE])[0]
    assert leaf.dtype == jnp.float32


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(rank=0), "rank"),
        (dict(rank_pattern=(("q_proj", -1),)), "rank"),
        (dict(alpha=0.0), "alpha"),
        (dict(targets=()), "targets is empty"),
        (dict(targets=("q_porj",)), "'q_porj' is none of all, attention, mlp"),
        (dict(targets=("q(",)), "not a regex"),
        (dict(train_full=("norm",)), "'norm' is not one of"),
        (dict(train_full=("score",)), "no score"),
    ],
)
def test_what_cannot_be_is_refused_by_name(base, settings, words):
    model, params = base
    with pytest.raises(ValueError, match=words):
        lora.init(model, params, LoraConfig(**settings), jax.random.key(1))
