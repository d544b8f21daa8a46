"""Tests for jalign/train/grpo.py."""

import functools

import jax
import numpy as np
import pytest

from jalign import sharding
from jalign.losses.registry import REGISTRY
from jalign.train.actors import make_actors
from jalign.train.grpo import iterate, make_learner, start_state
from jalign.train.online_config import ComputeOptions
from jalign.train.optim import OptimConfig
from tests.train.grpo_world import make_group_cast, make_grpo_config
from tests.train.ppo_world import make_prompts

# Not Adam's 1e-8, which makes steps of rounding noise where the gradient vanishes.
OPTIM = OptimConfig(learning_rate=3e-3, schedule="constant", eps=1e-2)


@functools.cache
def compiled(config, mesh):
    cast = make_group_cast(mesh)
    learner = make_learner(cast, config, config.steps)
    return cast, learner, make_actors(cast, config, group_size=config.group_size)


def start(config, mesh=None):
    cast, learner, actors = compiled(config, mesh)
    # The cast is kept between tests, so its parameters must not be taken over.
    cast = cast._replace(policy_params=jax.tree.map(np.array, cast.policy_params))
    parts = {"actors": actors, "learner": learner, "config": config, "mesh": mesh}
    return start_state(cast, learner, config), parts


def one_iteration(config, mesh=None):
    state, parts = start(config, mesh)
    state, metrics = iterate(state, make_prompts(), **parts)
    return sharding.gather(state.policy.params), metrics


def assert_close(got, want, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), got, want)


def test_ratio_is_1_at_the_first_update():
    config = make_grpo_config()
    state, parts = start(config)
    state, metrics = iterate(state, make_prompts(), **parts)
    assert metrics["ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1)
    assert state.iteration == 1 and int(state.policy.step) == 4


def test_a_random_model_learns_to_say_a():
    config = make_grpo_config(steps=20, grpo={"num_minibatches": 1})
    state, parts = start(config)
    rewards = []
    for _ in range(config.steps):
        state, metrics = iterate(state, make_prompts(), **parts)
        rewards.append(metrics["reward"])
    assert np.mean(rewards[:3]) < 0.2
    assert np.mean(rewards[-3:]) > 0.4
    assert metrics["skipped"] == 0


def test_metrics_have_trls_names_and_the_common_ones():
    _, metrics = one_iteration(make_grpo_config(grpo={"beta": 0.1}))
    names = """loss policy_loss grad_norm learning_rate num_tokens entropy kl reward
    reward_std frac_reward_zero_std rewards/reward/mean rewards/reward/std
    clip_ratio/region_mean clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean
    clip_ratio/high_max completions/mean_length completions/clipped_ratio
    sampling/sampling_logp_difference/mean sampling/importance_sampling_ratio/max
    episode eps skipped"""
    assert set(names.split()) <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["episode"] == 16 and metrics["kl"] >= 0


def test_without_beta_there_is_no_reference():
    cast, _, actors = compiled(make_grpo_config(), None)
    assert actors.reference is None and actors.critic is None
    _, metrics = one_iteration(make_grpo_config())
    assert "kl" not in metrics


@pytest.mark.parametrize("name", REGISTRY["grpo"])
def test_every_loss_takes_a_finite_step(name):
    once = {"num_epochs": 1, "num_minibatches": 1, "loss": name}
    before, _ = start(make_grpo_config(grpo=once))
    before = jax.device_get(before.policy.params)
    params, metrics = one_iteration(make_grpo_config(grpo=once))
    assert np.isfinite(metrics["loss"]) and 0 < metrics["grad_norm"] < 100
    assert metrics["clip_ratio/region_mean"] == 0  # nothing has moved yet
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


def test_microbatches_change_nothing():
    grpo = {"beta": 0.1, "entropy_coef": 0.01, "num_minibatches": 1}
    cut = grpo | {"compute": ComputeOptions(microbatches=4)}
    whole, parts = (
        one_iteration(make_grpo_config(grpo=g, optim=OPTIM)) for g in (grpo, cut)
    )
    assert_close(parts[0], whole[0])
    for name in ("loss", "kl", "entropy", "clip_ratio/region_mean", "grad_norm"):
        assert parts[1][name] == pytest.approx(whole[1][name], abs=1e-5), name


def test_a_mesh_changes_nothing():
    config = make_grpo_config(grpo={"beta": 0.1}, optim=OPTIM)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    alone, spread = one_iteration(config), one_iteration(config, mesh)
    assert_close(spread[0], alone[0], atol=2e-4)
    assert spread[1]["reward"] == alone[1]["reward"]


def test_padding_changes_nothing():
    narrow = make_grpo_config(grpo={"loss": "grpo"}, optim=OPTIM)
    state, parts = start(narrow)
    plain, _ = iterate(state, make_prompts(), **parts)

    def padded(sample):
        """The sampler with room behind every completion."""

        def wide(*args):
            made = sample(*args)
            return type(made)(*(np.pad(x, ((0, 0), (0, 16))) for x in made))

        return wide

    state, parts = start(narrow)
    actors = parts["actors"]
    parts["actors"] = actors._replace(sample=padded(actors.sample), max_length=64)
    wide, _ = iterate(state, make_prompts(), **parts)
    assert_close(wide.policy.params, plain.policy.params)


def test_a_strong_kl_holds_the_policy():
    config = make_grpo_config(grpo={"beta": 30.0, "num_minibatches": 1})
    state, parts = start(config)
    for _ in range(6):
        state, metrics = iterate(state, make_prompts(), **parts)
    assert metrics["kl"] < 0.02


def test_a_whole_iteration_repeats_bit_for_bit():
    one, other = (one_iteration(make_grpo_config())[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, other)
