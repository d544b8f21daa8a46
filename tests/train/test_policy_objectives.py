"""PPO's objectives are their loss functions, masked and summed."""

import jax
import jax.numpy as jnp
import pytest

from jalign.train import forward, policy_objectives
from jalign.types import Rollout
from tests.train import tiny
from tests.train.tiny import ratio

KEY = jax.random.key(0)


def rollout(model, params, value_model, value_params):
    batch = tiny.token_batch(4)
    logps = forward.token_logps(model, params, batch)
    values = forward.token_values(value_model, value_params, batch)
    advantages = jnp.where(batch.completion_mask, 1.5, 0.0)
    return Rollout(*batch, logps, logps, values, advantages, values + advantages)


def test_ppo_starts_with_ratio_one(language_model, scored_model):
    batch = rollout(*language_model, *scored_model)
    model, params = language_model
    loss = policy_objectives.make_ppo_objective(model, clip_eps=0.2)(params, batch, KEY)
    assert ratio(loss.metrics["val/ratio"]) == pytest.approx(1, abs=1e-5)
    assert ratio(loss.metrics["policy/clipfrac_avg"]) == 0
    assert float(loss.sum / loss.count) == pytest.approx(-1.5, abs=1e-4)
    bonus = policy_objectives.make_ppo_objective(model, clip_eps=0.2, entropy_coef=0.1)
    entropy = ratio(loss.metrics["policy/entropy_avg"])
    other = bonus(params, batch, KEY)
    expected = -1.5 - 0.1 * entropy
    assert float(other.sum / other.count) == pytest.approx(expected, abs=1e-4)


def test_value(language_model, scored_model):
    batch = rollout(*language_model, *scored_model)
    model, params = scored_model
    loss = policy_objectives.make_value_objective(model, clip_eps=0.2)(
        params, batch, KEY
    )
    assert float(loss.sum / loss.count) == pytest.approx(0.5 * 1.5**2, rel=1e-4)
    assert ratio(loss.metrics["val/clipfrac_avg"]) == 0
