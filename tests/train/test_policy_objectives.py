"""The objectives of online runs are their loss functions, masked and summed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import losses
from jalign.losses.registry import REGISTRY
from jalign.train import forward, policy_objectives
from jalign.train.grpo_config import GRPOOptions
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


def moved_rollout(model, params):
    """A Rollout whose old log-probabilities are not the policy's any more."""
    batch = tiny.token_batch(4)
    logps = forward.token_logps(model, params, batch)
    noise, other = jax.random.normal(KEY, (2, *logps.shape))
    sign = jnp.where(jnp.arange(len(logps)) % 2, 1.0, -1.0)  # one along a row
    advantages = jnp.where(batch.completion_mask, sign[:, None], 0.0)
    old, ref = logps + 0.3 * noise, logps + 0.2 * other
    return Rollout(*batch, old, ref, None, advantages, None), logps


def test_grpo_is_the_loss_its_kl_and_its_entropy(language_model):
    model, params = language_model
    batch, logps = moved_rollout(model, params)
    options = GRPOOptions(loss="grpo", clip_eps=0.1)
    make = functools.partial(
        policy_objectives.make_grpo_objective,
        model,
        terms=options.terms(),
        reduction=options.reduction,
    )
    loss = make()(params, batch._replace(ref_logps=None), KEY)
    mask = batch.completion_mask
    args = logps, batch.old_logps, batch.advantages
    token_loss = losses.ppo_policy_loss(*args, clip_eps=0.1)
    want = ratio(losses.sequence_mean(token_loss, mask))
    assert float(loss.sum / loss.count) == pytest.approx(want, rel=1e-5)
    clipped = ratio(losses.token_mean(losses.clip_frac(*args, clip_eps=0.1), mask))
    assert ratio(loss.metrics["clip_ratio/region_mean"]) == pytest.approx(clipped)
    assert 0 < clipped < 1 and "kl" not in loss.metrics
    both = make(beta=0.5, entropy_coef=0.1)(params, batch, KEY)
    kl = losses.kl_k3(logps, batch.ref_logps)
    entropy = forward.token_stats(model, params, batch).entropy
    more = losses.sequence_mean(0.5 * kl - 0.1 * entropy, mask)
    assert float(both.sum / both.count) == pytest.approx(want + ratio(more), rel=1e-4)


def test_every_loss_of_the_command_line_is_finite_and_starts_unclipped(language_model):
    """Their values and gradients are TRL's: tests/losses/test_registry.py."""
    model, params = language_model
    batch, logps = moved_rollout(model, params)
    on_policy = batch._replace(old_logps=logps)
    objectives = {}
    for name in REGISTRY["grpo"]:
        options = GRPOOptions(loss=name)
        objectives[name] = policy_objectives.make_grpo_objective(
            model, terms=options.terms(), reduction=options.reduction
        )

    @jax.jit
    def everything(params, batch):
        return {k: f(params, batch, KEY) for k, f in objectives.items()}

    for moved, found in enumerate(everything(params, b) for b in (on_policy, batch)):
        for name, loss in found.items():
            assert np.isfinite(float(loss.sum / loss.count)) and loss.count > 0, name
            region = ratio(loss.metrics["clip_ratio/region_mean"])
            assert region == 0 if not moved else 0 <= region < 1, name


def test_clip_ratios_follow_the_loss():
    """One row above the bounds, one below, one inside; of either sign of A."""
    logps = jnp.array([[0.5], [-0.5], [0.0], [0.5], [-0.5], [0.0]]) * jnp.ones((6, 2))
    advantages = jnp.array([[1.0], [1.0], [1.0], [-1.0], [-1.0], [-1.0]])
    inputs = {
        "logps": logps,
        "old_logps": jnp.zeros((6, 2)),
        "advantages": advantages * jnp.ones((6, 2)),
        "mask": jnp.ones((6, 2), bool),
    }
    for name, low, high in [
        ("grpo:clip_eps=0.2", 1 / 6, 1 / 6),
        ("grpo:clip_eps=0.2,clip_eps_high=0.9", 1 / 6, 0),
        ("gspo:clip_eps=0.2", 1 / 6, 1 / 6),
        ("sapo", 0, 0),
    ]:
        (term,) = GRPOOptions(loss=name).terms().values()
        found = policy_objectives.clip_ratios(term, inputs)
        assert ratio(found["clip_ratio/low_mean"]) == pytest.approx(low), name
        assert ratio(found["clip_ratio/high_mean"]) == pytest.approx(high), name
        region = ratio(found["clip_ratio/region_mean"])
        np.testing.assert_allclose(region, low + high, rtol=1e-6)
