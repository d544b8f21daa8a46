"""Tests for jalign/train/grpo.py."""

import functools

import jax
import numpy as np
import pytest

from jalign import sharding
from jalign.train.actors import make_actors
from jalign.train.grpo import iterate, make_learner, start_state
from jalign.train.online_config import ComputeOptions
from jalign.train.optim import OptimConfig
from tests.train.grpo_world import make_group_cast, make_grpo_config
from tests.train.ppo_world import make_prompts

# Not Adam's 1e-8, which makes steps of rounding noise where the gradient vanishes.
OPTIM = OptimConfig(learning_rate=3e-3, schedule="constant", eps=1e-2)
ALL = {"loss": "grpo", "beta": 0.1, "entropy_coef": 0.01}
FULL = make_grpo_config(grpo=ALL, optim=OPTIM)  # compiled once for most tests


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


@functools.cache
def plain():
    """What most tests compare with: an iteration of FULL on one device."""
    return one_iteration(FULL)


def test_ratio_is_1_at_the_first_update():
    _, metrics = plain()
    assert metrics["ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1)


def test_metrics_have_trls_names_and_the_common_ones():
    _, metrics = plain()
    names = """loss policy_loss grad_norm learning_rate num_tokens entropy kl reward
    reward_std frac_reward_zero_std rewards/reward/mean rewards/reward/std
    clip_ratio/region_mean clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean
    clip_ratio/high_max completions/mean_length completions/clipped_ratio
    sampling/sampling_logp_difference/mean sampling/importance_sampling_ratio/max
    episode eps skipped"""
    assert set(names.split()) <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["episode"] == 16 and metrics["kl"] >= 0


def test_a_whole_iteration_repeats_bit_for_bit():
    again, _ = one_iteration(FULL)
    jax.tree.map(np.testing.assert_array_equal, again, plain()[0])


def test_microbatches_change_nothing():
    cut = ALL | {"compute": ComputeOptions(microbatches=4)}
    params, metrics = one_iteration(make_grpo_config(grpo=cut, optim=OPTIM))
    assert_close(params, plain()[0])
    for name in ("loss", "kl", "entropy", "clip_ratio/region_mean", "grad_norm"):
        assert metrics[name] == pytest.approx(plain()[1][name], abs=1e-5), name


def test_a_mesh_changes_nothing():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params, metrics = one_iteration(FULL, mesh)
    assert_close(params, plain()[0], atol=2e-4)
    assert metrics["reward"] == plain()[1]["reward"]


def test_padding_changes_nothing():
    state, parts = start(FULL)
    actors = parts["actors"]

    def wide(*args):
        """The sampler, with room behind every completion."""
        made = actors.sample(*args)
        return type(made)(*(np.pad(x, ((0, 0), (0, 16))) for x in made))

    parts["actors"] = actors._replace(sample=wide, max_length=64)
    state, metrics = iterate(state, make_prompts(), **parts)
    assert_close(state.policy.params, plain()[0])
    assert metrics["num_tokens"] == plain()[1]["num_tokens"]


def test_a_random_model_learns_to_say_a():
    config = make_grpo_config(steps=20)
    state, parts = start(config)
    rewards = []
    for _ in range(config.steps):
        state, metrics = iterate(state, make_prompts(), **parts)
        rewards.append(metrics["reward"])
    assert np.mean(rewards[:3]) < 0.2
    assert np.mean(rewards[-3:]) > 0.4
    assert metrics["skipped"] == 0 and int(state.policy.step) == 40
    # Without beta there is no reference, and nothing to be said of it.
    actors = parts["actors"]
    assert actors.reference is None and actors.critic is None and "kl" not in metrics
