"""Iterations of GRPO, in memory."""

import functools

import chex
import jax
import numpy as np
import pytest

from jalign import sharding
from jalign.train.config import ComputeOptions
from jalign.train.grpo import GRPO, make_group_rollout
from jalign.train.online_models import make_functions
from jalign.train.optim import OptimConfig
from jalign.train.rollout import sample_and_score
from jalign.train.updates import (
    iterate,
    make_trainers,
    over_updates,
    rollout_prompts,
    start_state,
    update,
)
from tests.train.grpo_world import make_group_models, make_grpo_config
from tests.train.ppo_world import make_prompts

# Not Adam's 1e-8, which makes steps of rounding noise where the gradient vanishes.
OPTIM = OptimConfig(learning_rate=3e-3, schedule="constant", eps=1e-2)
ALL = {"loss": "grpo", "beta": 0.1, "entropy_coef": 0.01}
FULL = make_grpo_config(grpo=ALL, optim=OPTIM)  # compiled once for most tests
CUT = make_grpo_config(grpo=ALL, compute=ComputeOptions(microbatches=4), optim=OPTIM)


@functools.cache
def compiled(config, mesh):
    models = make_group_models(mesh)
    trainers = make_trainers(GRPO, models, config, config.steps)
    functions = make_functions(models, config, group_size=config.group_size)
    return models, trainers, functions


def start(config, mesh=None):
    models, trainers, functions = compiled(config, mesh)
    # They are kept between tests, so the parameters must not be taken over.
    models = models._replace(params=jax.tree.map(np.array, models.params))
    parts = {"algorithm": GRPO, "functions": functions, "trainers": trainers}
    parts |= {"config": config, "mesh": mesh}
    return start_state(models, trainers, config), parts


def one_iteration(config, mesh=None):
    state, parts = start(config, mesh)
    state, metrics = iterate(state, make_prompts(), **parts)
    return sharding.gather(state.params), metrics


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
    params, metrics = one_iteration(CUT)
    assert_close(params, plain()[0])
    for name in ("loss", "kl", "entropy", "clip_ratio/region_mean", "grad_norm"):
        assert metrics[name] == pytest.approx(plain()[1][name], abs=1e-5), name


def once(**changes):
    """A config of one update a rollout."""
    return make_grpo_config(grpo=ALL | {"num_epochs": 1} | changes, optim=OPTIM)


def counted(functions):
    """The same functions, and a list that grows with each of the policy's passes."""
    calls = []

    def score(*args):
        found = functions.score(*args)
        calls.extend(found.keys() & {"policy"})
        return found

    return functions._replace(score=score), calls


@pytest.mark.parametrize(("config", "passes"), [(once(), 0), (FULL, 1)])
def test_the_policys_pass_is_made_for_several_updates_only(config, passes):
    state, parts = start(config)
    parts["functions"], calls = counted(parts["functions"])
    for number in range(1, 3):
        state, _ = iterate(state, make_prompts(), **parts)
        assert len(calls) == passes * number


@pytest.mark.parametrize("changes", [{}, {"mask_truncated": True}])
def test_one_update_is_the_same_without_the_policys_pass(changes):
    config = once(**changes)
    got, metrics = one_iteration(config)
    state, parts = start(config)
    chosen, key = rollout_prompts(make_prompts(), config, 0)
    functions, algorithm = parts.pop("functions"), parts.pop("algorithm")
    scored = sample_and_score(functions, {"policy": state.params}, chosen, key)
    rollout = make_group_rollout(scored, scored.rewards, 0.0, config.grpo)
    assert rollout.old_logps is not None
    models, rows = update(state, rollout, **parts)
    expected = over_updates(rows, algorithm)
    policy = models["policy"]
    chex.assert_trees_all_close(got, policy.params, rtol=1e-5, atol=1e-7)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_sampler_is_measured_with_and_without_the_policys_pass():
    """A sampler whose log-probabilities are off by 0.25 nats, up and down."""
    names = (
        "sampling_logp_difference/mean",
        "sampling_logp_difference/max",
        "importance_sampling_ratio/min",
        "importance_sampling_ratio/mean",
        "importance_sampling_ratio/max",
    )
    for config in (once(), CUT):  # with two updates, each of four parts
        state, parts = start(config)
        functions = parts["functions"]

        def off(*args, functions=functions):
            made = functions.sample(*args)
            sign = np.float32([0.25, -0.125])[np.arange(made.tokens.shape[1]) % 2]
            return made._replace(logps=made.logps + sign)

        parts["functions"] = functions._replace(sample=off)
        _, metrics = iterate(state, make_prompts(), **parts)
        found = {name: metrics[f"sampling/{name}"] for name in names}
        assert found["sampling_logp_difference/max"] == pytest.approx(0.25, abs=1e-5)
        assert found["importance_sampling_ratio/min"] == pytest.approx(np.exp(-0.25))
        assert found["importance_sampling_ratio/max"] == pytest.approx(np.exp(0.125))
        assert 0.125 < found["sampling_logp_difference/mean"] < 0.25
        assert np.exp(-0.25) < found["importance_sampling_ratio/mean"] < np.exp(0.125)
        assert not [name for name in metrics if name.endswith("sampler_gap")]
        assert metrics.keys() == plain()[1].keys()


def test_extremes_are_over_the_updates_that_trained_a_token():
    common = "skipped learning_rate ratio clip_ratio/low_mean clip_ratio/high_mean"
    extremes = (-0.5, 0.125), (-0.25, 0.25), (np.inf, -np.inf)
    rows = [
        dict.fromkeys(common.split(), 0.0)
        | {"min_sampler_gap": low, "max_sampler_gap": high}
        for low, high in extremes
    ]
    names = (
        "sampling/sampling_logp_difference/max",
        "sampling/importance_sampling_ratio/min",
        "sampling/importance_sampling_ratio/max",
    )
    found = [over_updates(rows, GRPO)[name] for name in names]
    assert found == pytest.approx([0.5, np.exp(-0.5), np.exp(0.25)])
    assert [over_updates(rows[2:], GRPO)[name] for name in names] == [0, 1, 1]


def test_a_mesh_changes_nothing():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params, metrics = one_iteration(FULL, mesh)
    assert_close(params, plain()[0], atol=2e-4)
    assert metrics["reward"] == plain()[1]["reward"]


def test_padding_changes_nothing():
    state, parts = start(FULL)
    functions = parts["functions"]

    def wide(*args):
        """The sampler, with room behind every completion."""
        made = functions.sample(*args)
        return type(made)(*(np.pad(x, ((0, 0), (0, 16))) for x in made))

    parts["functions"] = functions._replace(sample=wide, row_lengths=(64,))
    state, metrics = iterate(state, make_prompts(), **parts)
    assert_close(state.params, plain()[0])
    assert metrics["num_tokens"] == plain()[1]["num_tokens"]


def test_a_random_model_learns_to_say_a():
    """The end over ten seeds of model and sampling: 0.77 to 0.90."""
    config = make_grpo_config(steps=20)
    state, parts = start(config)
    rewards = []
    for _ in range(config.steps):
        state, metrics = iterate(state, make_prompts(), **parts)
        rewards.append(metrics["reward"])
    assert np.mean(rewards[:3]) < 0.2
    assert np.mean(rewards[-3:]) > 0.4
    assert metrics["skipped"] == 0 and int(state.models["policy"].step) == 40
    # Without beta there is no reference, and nothing to be said of it.
    score = parts["functions"].score
    assert score({"policy": state.params}, None, False) == {} and "kl" not in metrics
