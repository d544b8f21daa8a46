"""Where a mixture's tokens go: noted, given again, and told to the losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import forward, losses
from jalign.models import Experts, Model, ModelConfig
from jalign.models.experts import Routing, sums_of
from jalign.types import TokenBatch
from tests.models.tiny import SIZES, random_params, random_tokens

CONFIG = ModelConfig(**SIZES, family="qwen2_moe", experts=Experts(5, 2, False, 12))
TOKENS = random_tokens((2, 12))
SEGMENTS = (np.arange(12) < np.array([[12], [7]])).astype(np.int32)


@pytest.fixture(scope="module")
def model_and_params():
    return Model(CONFIG), random_params(Model(CONFIG))


@pytest.fixture(scope="module")
def routed(model_and_params):
    model, params = model_and_params
    return jax.jit(model.apply_routed)(params, TOKENS, segment_ids=SEGMENTS)


def test_routes_are_noted_for_tokens_that_count(model_and_params, routed):
    model, params = model_and_params
    hidden, routing = routed
    assert isinstance(routing, Routing)
    plain, _ = jax.jit(model.apply)(params, TOKENS, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(hidden, plain)
    ids = np.asarray(routing.ids)
    assert ids.shape == (2, 12, 2, 2)
    assert (ids[..., 0] != ids[..., 1]).all()
    chosen = ids[SEGMENTS == 1].reshape(-1)
    want = np.bincount(chosen, minlength=5) / (chosen.size / 2)
    np.testing.assert_allclose(routing.load, want, rtol=1e-6)
    np.testing.assert_allclose(routing.probability.sum(), 1.0, rtol=1e-6)


@pytest.mark.parametrize("changes", [dict(unroll=True), dict(remat=True)])
def test_unrolled_and_rematerialised_layers_note_the_same(
    model_and_params, routed, changes
):
    model, params = model_and_params
    again = jax.jit(model.replace(**changes).apply_routed)
    _, routing = again(params, TOKENS, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(routing.ids, routed[1].ids)
    np.testing.assert_allclose(routing.load, routed[1].load, rtol=1e-6)
    np.testing.assert_allclose(routing.probability, routed[1].probability, rtol=1e-5)


def test_routes_that_are_given_are_taken(model_and_params, routed):
    """Also by a router that would choose others, whose probabilities then count."""
    model, params = model_and_params
    apply = jax.jit(model.apply)
    ids = routed[1].ids
    hidden, _ = apply(params, TOKENS, segment_ids=SEGMENTS, routing=ids)
    np.testing.assert_array_equal(hidden, routed[0])
    router = params["layers"]["mlp"]["router"]["weight"]
    mlp = params["layers"]["mlp"] | {"router": {"weight": -router}}
    other = params | {"layers": params["layers"] | {"mlp": mlp}}
    how = jax.jit(model.apply_routed)
    _, own = how(other, TOKENS, segment_ids=SEGMENTS)
    assert (np.asarray(own.ids[:, :, 0]) != np.asarray(ids[:, :, 0])).mean() > 0.5
    _, replayed = how(other, TOKENS, segment_ids=SEGMENTS, routing=ids)
    np.testing.assert_array_equal(replayed.ids, ids)
    unrolled = jax.jit(model.replace(unroll=True).apply)
    one = apply(other, TOKENS, segment_ids=SEGMENTS, routing=ids)[0]
    two = unrolled(other, TOKENS, segment_ids=SEGMENTS, routing=ids)[0]
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_a_rollout_keeps_the_routes_and_the_update_takes_them(model_and_params):
    model, params = model_and_params
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape)
    batch = TokenBatch(TOKENS, SEGMENTS == 1, SEGMENTS, positions)
    kept = jax.jit(forward.policy_pass, static_argnums=0)(model, params, batch)
    assert kept.routing.dtype == jnp.uint8 and kept.routing.shape == (2, 12, 2, 2)
    plain = jax.jit(forward.token_logps, static_argnums=0)(model, params, batch)
    np.testing.assert_array_equal(kept.logps, plain)


def test_load_balancing_loss_is_switch_transformers():
    """eq. 4 of arXiv:2101.03961 by hand, and 1 per expert chosen where all is even."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (2, 3, 2))
    p = rng.dirichlet(np.ones(4), (2, 3))
    real = np.array([[1, 1, 0], [1, 1, 1]], bool)
    chosen, probability, count = sums_of(ids, jnp.asarray(p, jnp.float32), real)
    got = losses.load_balancing_loss(chosen / count, probability / count)
    f = [(ids[real] == e).sum() / 5 for e in range(4)]
    want = 4 * sum(f[e] * p[real][:, e].mean() for e in range(4))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    even = losses.load_balancing_loss(jnp.full(4, 0.5), jnp.full(4, 0.25))
    np.testing.assert_allclose(even, 2.0)
    grad = jax.grad(losses.load_balancing_loss, argnums=(0, 1))(
        jnp.arange(4.0), jnp.full(4, 0.25)
    )
    np.testing.assert_array_equal(grad[0], np.zeros(4))
    np.testing.assert_allclose(grad[1], 4 * np.arange(4.0))
