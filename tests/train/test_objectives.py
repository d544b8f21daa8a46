"""Each objective is its loss function, masked and summed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses
from jalign.train import forward, objectives
from jalign.types import Rollout
from tests.train import tiny

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def language_model():
    model = tiny.model()
    return model, model.init(KEY)


@pytest.fixture(scope="module")
def scored_model():
    model = tiny.model(num_labels=1)
    return model, model.init(KEY)


def ratio(pair):
    return float(pair[0] / pair[1])


def test_sft(language_model):
    model, params = language_model
    batch = tiny.token_batch(4)
    logps = forward.token_logps(model, params, batch)
    loss = objectives.make_sft_objective(model)(params, batch, KEY)
    np.testing.assert_allclose(loss.sum, -np.sum(logps), rtol=1e-5)
    assert float(loss.count) == batch.completion_mask.sum()
    np.testing.assert_allclose(loss.metrics["nll"][0], loss.sum, rtol=1e-6)
    assert 0 <= ratio(loss.metrics["mean_token_accuracy"]) <= 1
    assert 0 < ratio(loss.metrics["entropy"]) <= np.log(tiny.VOCAB) + 1e-4
    smooth = objectives.make_sft_objective(model, label_smoothing=0.2, z_loss=0.1)
    other = smooth(params, batch, KEY)
    assert float(other.sum) != float(loss.sum)
    np.testing.assert_allclose(other.metrics["nll"][0], loss.sum, rtol=1e-6)


def test_dpo_starts_at_log_two(language_model):
    model, params = language_model
    batch = tiny.pair_batch(4)
    chosen, rejected = forward.split_pairs(
        forward.make_reference_fn(model)(params, forward.interleave(batch))
    )
    batch = batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    objective = objectives.make_dpo_objective(model, beta=0.3)
    loss = objective(params, batch, KEY)
    np.testing.assert_allclose(loss.sum / loss.count, np.log(2), rtol=1e-4)
    assert float(loss.count) == 4
    np.testing.assert_allclose(ratio(loss.metrics["rewards/margins"]), 0, atol=1e-4)
    shifted = batch._replace(ref_chosen_logps=chosen - 10.0)
    loss = objective(params, shifted, KEY)
    np.testing.assert_allclose(ratio(loss.metrics["rewards/margins"]), 3, rtol=1e-3)
    np.testing.assert_allclose(ratio(loss.metrics["logps/chosen"]), chosen.mean(), 1e-4)
    assert ratio(loss.metrics["rewards/accuracies"]) == 1
    np.testing.assert_allclose(loss.sum / loss.count, np.log1p(np.exp(-3.0)), rtol=1e-3)


def test_reward(scored_model):
    model, params = scored_model
    batch = tiny.pair_batch(4)
    chosen = forward.sequence_rewards(model, params, batch.chosen)
    rejected = forward.sequence_rewards(model, params, batch.rejected)
    loss = objectives.make_reward_objective(model)(params, batch, KEY)
    expected = losses.bradley_terry_loss(chosen, rejected).sum()
    np.testing.assert_allclose(loss.sum, expected, rtol=1e-5)
    low = jnp.minimum(chosen, rejected).min()
    np.testing.assert_allclose(loss.metrics["min_reward"][0], low, rtol=1e-5)
    centered = objectives.make_reward_objective(model, center_coef=0.5)
    extra = 0.5 * jnp.square(chosen + rejected).sum()
    got = centered(params, batch, KEY).sum
    np.testing.assert_allclose(got, expected + extra, rtol=1e-5)


def rollout(model, params, value_model, value_params):
    batch = tiny.token_batch(4)
    logps = forward.token_logps(model, params, batch)
    values = forward.token_values(value_model, value_params, batch)
    advantages = jnp.where(batch.completion_mask, 1.5, 0.0)
    return Rollout(*batch, logps, logps, values, advantages, values + advantages)


def test_ppo_starts_with_ratio_one(language_model, scored_model):
    batch = rollout(*language_model, *scored_model)
    model, params = language_model
    loss = objectives.make_ppo_objective(model, clip_eps=0.2)(params, batch, KEY)
    assert ratio(loss.metrics["val/ratio"]) == pytest.approx(1, abs=1e-5)
    assert ratio(loss.metrics["policy/clipfrac_avg"]) == 0
    assert float(loss.sum / loss.count) == pytest.approx(-1.5, abs=1e-4)
    bonus = objectives.make_ppo_objective(model, clip_eps=0.2, entropy_coef=0.1)
    entropy = ratio(loss.metrics["policy/entropy_avg"])
    other = bonus(params, batch, KEY)
    expected = -1.5 - 0.1 * entropy
    assert float(other.sum / other.count) == pytest.approx(expected, abs=1e-4)


def test_value(language_model, scored_model):
    batch = rollout(*language_model, *scored_model)
    model, params = scored_model
    loss = objectives.make_value_objective(model, clip_eps=0.2)(params, batch, KEY)
    assert float(loss.sum / loss.count) == pytest.approx(0.5 * 1.5**2, rel=1e-4)
    assert ratio(loss.metrics["val/clipfrac_avg"]) == 0
