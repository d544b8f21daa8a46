"""Shifting, masks and alignment, against the plain logits."""

import jax
import jax.numpy as jnp
import numpy as np

from jalign import losses
from jalign.train import forward
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
    sums = forward.make_reference_fn(model)(params, batch)
    expected = losses.sequence_logps(
        forward.token_logps(model, params, batch), jnp.asarray(batch.completion_mask)
    )
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_reward_is_read_at_the_last_token_and_values_before_each_token():
    model = tiny.model(num_labels=1)
    params = model.init(jax.random.key(0))
    batch = tiny.token_batch(4)
    scores = np.asarray(
        model.score(params, forward.hidden_states(model, params, batch))
    )
    last = (batch.segment_ids > 0).sum(1) - 1
    rewards = forward.sequence_rewards(model, params, batch)
    np.testing.assert_allclose(rewards, scores[np.arange(4), last], rtol=1e-6)
    values = np.asarray(forward.token_values(model, params, batch))
    mask = batch.completion_mask[:, 1:]
    np.testing.assert_allclose(values[:, 1:][mask], scores[:, :-1][mask], rtol=1e-6)


def test_interleaved_rows_split_back():
    batch = tiny.pair_batch(3)
    rows = forward.interleave(batch)
    chosen, rejected = forward.split_pairs(rows.tokens)
    np.testing.assert_array_equal(chosen, batch.chosen.tokens)
    np.testing.assert_array_equal(rejected, batch.rejected.tokens)
