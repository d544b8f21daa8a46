"""Attention whose time is cut over a context axis is that of one device."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models import Model
from jalign.models.attention import attend, attention_mask, plain_attention
from jalign.models.attention_context import attend_from
from jalign.models.platform import GPU, PLAIN, TPU
from jalign.models.scores import PLAIN_SCORES, Scores
from tests.models.rows import SCORES, packed_rows, random_qkv
from tests.models.tiny import FAMILY_CONFIGS, random_params, random_tokens


def in_one(qkv, ids, positions, window, scores):
    """The definition, and its gradients; padding counts nothing."""
    mask = jnp.asarray(attention_mask(positions, positions, ids, ids, window))
    real = jnp.asarray(ids > 0)[..., None, None]
    where = scores, jnp.asarray(positions), jnp.asarray(positions)

    def loss(*qkv):
        return (jnp.where(real, plain_attention(*qkv, mask, *where), 0) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(*qkv)


def on_mesh(qkv, ids, positions, window, scores, **how):
    real = jnp.asarray(ids > 0)[..., None, None]
    segments = dict(q_segment_ids=ids, kv_segment_ids=ids)

    @jax.jit
    def loss(*qkv):
        where = dict(q_positions=positions, kv_positions=positions) | segments
        out = attend(*qkv, **where, sliding_window=window, scores=scores, **how)
        return (jnp.where(real, out, 0) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*qkv)


def same(got, want, rtol=1e-6):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) <= rtol * np.linalg.norm(other)


CAPPED = Scores(scale=0.7, softcap=0.8)
LONG = dict(fsdp=2, context=4)
# kv heads divide over tensor=2, and not over tensor=4; an odd context deals, too.
CASES = [("plain", LONG, 5, SCORES["all"]), ("blocked", LONG, None, PLAIN_SCORES)]
CASES += [("blocked", dict(context=2, tensor=2, fsdp=2), 5, SCORES["all"])]
CASES += [("blocked", dict(context=2, tensor=4, fsdp=1), None, SCORES["alibi"])]


@pytest.mark.parametrize(("name", "sizes", "window", "scores"), CASES)
def test_values_and_gradients_are_those_of_one_device(name, sizes, window, scores):
    ids, positions = packed_rows([[7, 20, 9], [48]], 48)
    given = random_qkv((2, 48, 4, 8), 2), ids, positions, window, scores
    mesh = sharding.make_mesh(**sizes)
    same(on_mesh(*given, implementation=name, mesh=mesh), in_one(*given))


def test_interpreted_splash_has_a_share_of_the_queries():
    ids, positions = packed_rows([[100, 150]], 256)
    given = random_qkv((1, 256, 2, 16), 1), ids, positions, 20, CAPPED
    mesh = sharding.make_mesh(context=2, fsdp=1, devices=jax.devices()[:2])
    how = dict(mesh=mesh, platform=TPU._replace(interpret=True))
    same(on_mesh(*given, implementation="splash", **how), in_one(*given))


@pytest.mark.parametrize(("piece", "tile", "window"), [(4, 8, None), (5, 7, 3)])
def test_runs_of_queries_see_the_keys_before_them(piece, tile, window):
    """Two runs that begin anywhere; sizes that divide nothing."""
    ids, positions = packed_rows([[7, 20, 9], [40]], 40)
    q, k, v = random_qkv((2, 40, 4, 8), 2)
    mask = jnp.asarray(attention_mask(positions, positions, ids, ids, window))
    want = plain_attention(q, k, v, mask)
    at = np.concatenate([np.arange(30, 40), np.arange(10, 20)])
    starts, slopes = jnp.array([30, 10]), jnp.zeros(4)
    how = window, PLAIN_SCORES, piece, tile
    got = attend_from(q[:, at], k, v, slopes, starts, ids[:, at], ids, *how)
    real = ids[:, at] > 0
    np.testing.assert_allclose(got[real], want[:, at][real], atol=1e-5)


IDS, POSITIONS = packed_rows([[20, 11], [32], [5, 25], [9]], 32)


def of_packed_rows(name, function):
    """function(a model's logits [4, 32, V] by its params) on a mesh, and on one device;
    0 on padding."""
    mesh = sharding.make_mesh(**LONG)
    model = Model(FAMILY_CONFIGS[name], mesh=mesh, attention="blocked")
    params = random_params(model)
    placed = jax.device_put(params, sharding.param_shardings(mesh, params))

    def result(model, params):
        def logits(params):
            where = dict(positions=POSITIONS, segment_ids=IDS)
            found = model.logits(params, random_tokens((4, 32)), **where)
            return jnp.where(jnp.asarray(IDS > 0)[..., None], found, 0)

        return jax.jit(function(logits))(params)

    return result(model, placed), result(model.replace(mesh=None), params)


def test_logits_and_gradients_with_windows_in_some_layers():
    weights = np.random.default_rng(0).normal(size=(4, 32, 48)).astype(np.float32)

    def weighted(logits):
        def loss(params):
            return jnp.sum(jnp.asarray(weights) * (z := logits(params))), z

        return jax.value_and_grad(loss, has_aux=True)

    got, want = of_packed_rows("gemma3_text", weighted)
    np.testing.assert_allclose(got[0][1], want[0][1], rtol=1e-5, atol=1e-5)
    same(*(jax.flatten_util.ravel_pytree(g)[0] for g in (got[1], want[1])), rtol=1e-5)


def test_logits_with_learned_positions():
    same(*of_packed_rows("opt", lambda logits: logits), rtol=1e-5)


def test_what_does_not_apply_is_refused_or_left_to_what_does():
    ids, positions = packed_rows([[32]], 32)
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv((1, 32, 4, 8), 2))
    mesh = sharding.make_mesh(context=8, fsdp=1)
    how = dict(q_positions=positions, kv_positions=positions, mesh=mesh)
    with pytest.raises(ValueError, match="cudnn.*context > 1"):
        attend(q, k, v, **how, implementation="cudnn")
    with pytest.raises(ValueError, match="splash.*4 tokens, is no multiple of 128"):
        attend(q, k, v, **how, implementation="splash")
    # Lengths that the mesh does not divide stay whole: prompts, odd rows to score.
    want = attend(q, k, v, **how, implementation="plain", platform=PLAIN)
    for platform in (GPU, TPU._replace(interpret=True)):
        got = attend(q, k, v, **how, platform=platform)
        np.testing.assert_array_equal(got, want)
    odd = [x[:, :24] for x in (q, k, v, positions)]
    how |= dict(q_positions=odd[3], kv_positions=odd[3])
    got = attend(*odd[:3], **how, implementation="blocked")
    np.testing.assert_allclose(got, want[:, :24], atol=0.02)
