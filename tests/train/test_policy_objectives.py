"""The objectives of online runs are their loss functions, masked and summed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import forward, losses, models
from jalign.train import policy_objectives
from jalign.train.loss_table import REGISTRY
from jalign.train.online_config import GRPOOptions
from jalign.types import Rollout
from tests.tolerance import assert_trees_close, float32_sum
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


def grad_of(f):
    return jax.jit(jax.value_and_grad(f, has_aux=True))


def test_one_trunk_has_the_sum_of_both_losses_and_gradients(language_model):
    key = jax.random.key(1)
    model, params = models.add_value_head(*language_model, key=key)
    policy, critic = (part[0] for part in models.split_heads(model, params))
    batch, _ = moved_rollout(*language_model)
    values = forward.token_values(model, params, batch)
    # Some values are clipped, with no gradient, and some are not.
    moved = values + 0.1 * jax.random.normal(key, values.shape)
    batch = batch._replace(values=moved, returns=values - 0.5)
    make = functools.partial(policy_objectives.make_ppo_objective, entropy_coef=0.1)
    shared = make(model, value_coef=0.3, value_clip_eps=0.05)
    alone = policy_objectives.make_value_objective(critic, clip_eps=0.05)

    def separate(params):
        language = {k: v for k, v in params.items() if k != "score"}
        scored = {k: v for k, v in params.items() if k != "unembed"}
        value = alone(scored, batch, KEY)
        return make(policy)(language, batch, KEY).sum + 0.3 * value.sum, value.metrics

    def together(params):
        loss = shared(params, batch, KEY)
        return loss.sum, loss.metrics

    (want, value), want_gradient = grad_of(separate)(params)
    (got, metrics), gradient = grad_of(together)(params)
    # Terms of about 1 that cancel, each from a network's sums one after the other.
    tokens = int(batch.completion_mask.sum())
    bound = float32_sum(tiny.SUM_LENGTH + tokens, tokens)
    assert float(got) == pytest.approx(float(want), abs=bound)
    assert_trees_close(gradient, want_gradient, n=tiny.SUM_LENGTH + tokens)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(want_gradient))
    assert 0 < ratio(value["val/clipfrac_avg"]) < 1
    for name in ("loss/value_avg", "val/clipfrac_avg"):
        assert ratio(metrics[name]) == pytest.approx(ratio(value[name]), rel=1e-4)


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
    """Their values and gradients are TRL's: tests/train/test_loss_table.py."""
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


def unstopped(inputs):
    """A term of a researcher's own that does not stop the gradient of old_logps."""
    return -jnp.exp(inputs["logps"] - inputs["old_logps"]) * inputs["advantages"]


@pytest.mark.parametrize("name", [*REGISTRY["grpo"], "unstopped", "ppo"])
def test_without_old_logps_the_policy_is_the_one_that_sampled(name, monkeypatch):
    """Value, gradient and metrics are those of its log-probabilities given as old."""

    def stats(model, logps, batch, *, temperature):
        """The parameters are the log-probabilities: all gradients go through them."""
        assert temperature == 0.7
        return forward.TokenStats(logps, jnp.exp(logps))

    monkeypatch.setattr(policy_objectives, "token_stats", stats)
    batch, logps = logps_rollout()
    if name == "ppo":
        objective = policy_objectives.make_ppo_objective(
            None, entropy_coef=0.1, temperature=0.7
        )
    else:
        options = GRPOOptions(loss="grpo" if name == "unstopped" else name)
        objective = policy_objectives.make_grpo_objective(
            None,
            terms={name: unstopped} if name == "unstopped" else options.terms(),
            reduction=options.reduction,
            beta=0.3,
            entropy_coef=0.1,
            temperature=0.7,
        )

    @jax.jit
    def both(logps, batch):
        def scalar(logps):
            loss = objective(logps, batch, KEY)
            return loss.sum, loss

        return jax.grad(scalar, has_aux=True)(logps)

    with_pass = both(logps, batch._replace(old_logps=logps))
    without = both(logps, batch)
    chex.assert_trees_all_close(without, with_pass, rtol=1e-6, atol=1e-7)
    assert np.abs(without[0]).max() > 0.1
    moved = both(logps, batch._replace(old_logps=0.9 * logps))
    entry = REGISTRY["grpo"].get(name)
    if entry is None or "old_logps" in entry.inputs:  # the others do not look at it
        assert np.abs(moved[0] - without[0]).max() > 1e-3
    if name != "ppo":
        gap = ratio(without[1].metrics["sampling/sampling_logp_difference/mean"])
        assert gap == pytest.approx(0.25)


def logps_rollout():
    batch = tiny.token_batch(4)
    mask = batch.completion_mask
    logps = jnp.where(mask, -jnp.exp(jax.random.normal(KEY, mask.shape)), 0.0)
    sign = jnp.where(jnp.arange(len(logps)) % 2, 1.0, -1.0)[:, None]
    advantages, ref = jnp.where(mask, sign, 0.0), 0.8 * logps
    sampler = jnp.where(mask, logps - 0.25 * sign, 0.0)
    return Rollout(*batch, None, ref, None, advantages, None, sampler), logps


def test_sampler_gaps_are_over_the_trained_tokens():
    mask = jnp.array([[False, True, True], [True, False, False]])
    logps = jnp.array([[9.0, -1.0, -2.0], [-0.5, 0.0, 0.0]])
    sampler = jnp.array([[0.0, -1.5, -1.0], [-0.25, 0.0, 7.0]])
    found = policy_objectives.sampler_gaps(logps, sampler, mask)
    gaps = np.array([0.5, -1.0, -0.25])
    mean = ratio(found["sampling/sampling_logp_difference/mean"])
    assert mean == pytest.approx(np.abs(gaps).mean())
    mean = ratio(found["sampling/importance_sampling_ratio/mean"])
    assert mean == pytest.approx(np.exp(gaps).mean())
    assert ratio(found["min_sampler_gap"]) == -1.0
    assert ratio(found["max_sampler_gap"]) == 0.5
    none = policy_objectives.sampler_gaps(logps, sampler, mask & False)
    assert ratio(none["min_sampler_gap"]) == np.inf == -ratio(none["max_sampler_gap"])


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
