"""Shifting, masks and alignment, against the plain logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import data, forward, losses, models, sharding
from tests.train import tiny


def test_logps_and_entropies_are_those_of_the_shifted_logits():
    model = tiny.model()
    params = model.init(jax.random.key(0))
    batch = tiny.token_batch(4)
    hidden, _ = model.apply(
        params,
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
    )
    logits = np.asarray(hidden @ model.unembed(params), np.float64) / 0.7
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    stats = forward.token_stats(model, params, batch, temperature=0.7)
    for b, t in zip(*np.nonzero(batch.completion_mask), strict=True):
        row = logs[b, t - 1]
        np.testing.assert_allclose(
            stats.logps[b, t], row[batch.tokens[b, t]], rtol=1e-4
        )
        np.testing.assert_allclose(
            stats.entropy[b, t], -(np.exp(row) * row).sum(), rtol=1e-4
        )
    assert not np.any(np.asarray(stats.logps)[~batch.completion_mask])
    plain = forward.token_logps(model, params, batch, temperature=0.7)
    np.testing.assert_allclose(plain, stats.logps, rtol=1e-6)


@pytest.mark.parametrize(
    "vocabulary, tokens", [(512, 1024), (32_000, 512), (128_256, 128), (10**7, 64)]
)
def test_a_cpu_has_fewer_logits_at_once_for_a_large_vocabulary(vocabulary, tokens):
    config = dataclasses.replace(tiny.model().config, vocab_size=vocabulary)
    assert forward.chunk_size(models.Model(config)) == tokens
    mesh = sharding.make_mesh(data=4, fsdp=2)
    assert forward.chunk_size(models.Model(config, mesh=mesh)) == 8 * tokens


def test_values_are_read_before_each_token():
    model = tiny.model(num_labels=1)
    params = model.init(jax.random.key(0))
    batch = tiny.token_batch(4)
    scores = np.asarray(
        model.score(params, forward.hidden_states(model, params, batch))
    )
    values = np.asarray(forward.token_values(model, params, batch))
    mask = batch.completion_mask[:, 1:]
    np.testing.assert_allclose(values[:, 1:][mask], scores[:, :-1][mask], rtol=1e-6)


def test_one_pass_gives_log_probs_and_values():
    params = tiny.model().init(jax.random.key(0))
    model, params = models.add_value_head(tiny.model(), params, key=jax.random.key(1))
    batch = tiny.token_batch(4)
    logps, values, _ = forward.policy_pass(model, params, batch, temperature=0.7)
    expected = forward.token_logps(model, params, batch, temperature=0.7)
    np.testing.assert_array_equal(logps, expected)
    np.testing.assert_array_equal(values, forward.token_values(model, params, batch))
    assert np.any(np.asarray(values) != 0)
    assert not np.any(np.asarray(values)[~np.asarray(batch.completion_mask)])
    stats = forward.token_stats(model, params, batch, temperature=0.7)
    np.testing.assert_array_equal(stats.values, values)
    # The temperature is 1 where none is given.
    for found in (forward.token_stats, forward.policy_pass):
        got = found(model, params, batch).logps
        want = forward.token_logps(model, params, batch, temperature=1.0)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("experts, dtype", [(256, jnp.uint8), (257, jnp.uint16)])
def test_the_experts_of_a_rollout_are_kept_in_few_bytes(experts, dtype):
    mixture = models.Experts(experts, 2)
    model = models.Model(tiny.config(experts=mixture, intermediate_size=4))
    kept = jax.eval_shape(
        functools.partial(forward.policy_pass, model),
        model.param_shapes(),
        tiny.token_batch(2),
    )
    assert kept.routing.dtype == dtype and kept.values is None


def test_routes_are_noted_within_the_block_alone():
    model = models.Model(tiny.config(experts=models.Experts(3, 2)))
    params, batch = model.param_shapes(), tiny.token_batch(2)

    def hidden(params):
        return forward.hidden_states(model, params, batch)

    with forward.noting_routes() as noted:
        jax.eval_shape(lambda params: hidden(params), params)
    jax.eval_shape(lambda params: hidden(params), params)
    assert len(noted) == 1


def test_rows_are_laid_behind_each_other_on_one_device_alone():
    mesh, x = sharding.make_mesh(fsdp=8), np.arange(24.0).reshape(2, 3, 4)
    rows = forward.rows_apart(tiny.model(), {"x": x})["x"]
    np.testing.assert_array_equal(rows, x.reshape(1, 6, 4))
    np.testing.assert_array_equal(forward.rows_apart(tiny.model(mesh), x), x)


def alone(pairs):
    """The sides of pairs, each in a row of its own: chosen, rejected, chosen, ..."""
    return data.collate_tokens([side for pair in pairs for side in pair[:2]], 16)


@pytest.mark.parametrize("layout", ["a pair a row", "packed"])
def test_log_probs_and_rewards_of_pairs_are_those_of_their_sides(layout):
    pairs = tiny.pairs(5)
    if layout == "packed":
        none = data.filler(pairs[0])
        parts = [
            data.PackedPairs([pairs[3], none, pairs[1]], [[0, 5], [1], [4]]),
            data.PackedPairs([pairs[0], pairs[4], pairs[2]], [[2], [1, 3, 5], [4, 0]]),
        ]
        order = {(0, 0): 3, (0, 2): 1, (1, 0): 0, (1, 1): 4, (1, 2): 2}
        batch = data.collate_preferences(parts, 40)
    else:
        order = {(i, 0): i for i in range(5)}
        batch = data.collate_preferences([*pairs, data.filler(pairs[0])], 16)
    valid = forward.valid_pairs(jax.tree.map(jnp.asarray, batch))
    assert {(int(r), int(p)) for r, p in np.argwhere(valid)} == set(order)
    model = tiny.model()
    params = model.init(jax.random.key(0))
    sides = alone(pairs)
    logps = losses.sequence_logps(
        forward.token_logps(model, params, sides), jnp.asarray(sides.completion_mask)
    )
    check(forward.make_reference_fn(model)(params, batch), order, logps)
    scored = tiny.model(num_labels=1)
    params = scored.init(jax.random.key(0))
    scores = scored.score(params, forward.hidden_states(scored, params, sides))
    last = (sides.segment_ids > 0).sum(1) - 1
    rewards = np.asarray(scores)[np.arange(10), last]
    check(forward.pair_rewards(scored, params, batch), order, rewards)


def check(found, order, expected):
    """(chosen, rejected) [B, P] against the sides' own values, 0 elsewhere."""
    for side, got in enumerate(map(np.array, found)):
        for place, pair in order.items():
            np.testing.assert_allclose(got[place], expected[2 * pair + side], rtol=1e-4)
            got[place] = 0.0
        assert not got.any()
