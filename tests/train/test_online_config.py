"""Tests for jalign/train/online_config.py: what both share, PPO's, and GRPO's."""

import dataclasses

import pytest

from jalign import losses
from jalign.train.config import ComputeOptions
from jalign.train.loss_table import REGISTRY
from jalign.train.online_config import (
    CriticConfig,
    GRPOConfig,
    GRPOOptions,
    KLConfig,
    OnlineConfig,
    OnlineOptions,
    PPOConfig,
    PPOOptions,
    SampleConfig,
    ScoreLimits,
    ScoreOptions,
)
from tests.train.grpo_world import make_grpo_config
from tests.train.ppo_world import make_config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreLimits(reward_clip=-1.0), "reward_clip"),
        (lambda: ScoreLimits(missing_eos_penalty=0), "missing_eos_penalty"),
        (lambda: SampleConfig(max_new_tokens=0), "max_new_tokens"),
        (lambda: SampleConfig(top_k=-1), "top_k"),
        (lambda: ComputeOptions(microbatches=0), "microbatches"),
        (lambda: OnlineOptions(num_minibatches=0), "num_minibatches"),
    ],
)
def test_what_both_algorithms_refuse_names_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [make_config, make_grpo_config])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 9}, "leaves no room"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"epochs": 0}, "epochs"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
        ({"reward": ""}, "reward ''"),
    ],
)
def test_both_configs_hold_the_shared_fields_to_their_ranges(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_ppo_has_one_completion_of_a_prompt_and_a_reference():
    config = make_config()
    assert config.group_size == 1 and config.completions == config.batch_size
    assert config.has_reference and config.options is config.ppo


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLConfig(kl_coef=-1), "kl_coef"),
        (lambda: KLConfig(kl_coef=0, kl_target=6), "kl_target needs kl_coef"),
        (lambda: ScoreOptions(missing_eos_penalty=-1), "missing_eos_penalty"),
        (lambda: ScoreOptions(reward_clip=0), "reward_clip"),
        (lambda: SampleConfig(temperature=0), "temperature"),
        (lambda: SampleConfig(top_p=0), "top_p"),
        (lambda: PPOOptions(num_epochs=0), "num_epochs"),
        (lambda: PPOOptions(clip_eps=1.0), "clip_eps"),
        (lambda: PPOOptions(gamma=1.1), "gamma"),
        (lambda: CriticConfig(value_clip_eps=0), "value_clip_eps"),
        (lambda: CriticConfig(shared_trunk=True, value_coef=0), "value_coef"),
        (lambda: CriticConfig(value_coef=0.1), "value_coef is for shared_trunk"),
        (
            lambda: CriticConfig(shared_trunk=True, critic_learning_rate=1e-3),
            "critic_learning_rate: with shared_trunk",
        ),
        (lambda: make_config(batch_size=15), "batch_size 15 must be a multiple"),
        (lambda: make_config(max_length=8), "max_length 8 leaves no room"),
        (lambda: make_config(steps=0), "steps"),
    ],
)
def test_what_ppo_refuses_names_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def leaves(config_class, seen):
    """Every dataclass of a config, with its fields' names."""
    names = ("model", "data", "out", "reward")
    needed = dict.fromkeys(names, "x") if issubclass(config_class, OnlineConfig) else {}
    config = config_class(**needed)
    names = [field.name for field in dataclasses.fields(config)]
    for name in names:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            leaves(type(value), seen)
        else:
            assert name not in seen, f"two flags would be --{name}"
            seen.add(name)
    return seen


def test_flags_of_ppo_are_flat_unique_and_hashable():
    assert {"kl_coef", "max_new_tokens", "learning_rate"} <= leaves(PPOConfig, set())
    hash(make_config())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPOOptions(group_size=1), "group_size must be >= 2, got 1"),
        (lambda: GRPOOptions(beta=-1), "beta must be >= 0"),
        (lambda: GRPOOptions(clip_eps=0), "clip_eps must be in"),
        (lambda: GRPOOptions(clip_eps=1.5), r"clip_eps must be in \(0, 1\), got 1.5"),
        (lambda: GRPOOptions(loss="gspo:clip_eps_high=-1"), "clip_eps_high .*'gspo'"),
        (lambda: GRPOOptions(loss="gpro"), "'gpro' is not one of .*did you mean"),
        (lambda: GRPOOptions(loss="sapo", clip_eps=0.1), "clip_eps is set, but no"),
        (lambda: GRPOOptions(loss="grpo + dapo"), "averaged in different ways"),
        (lambda: GRPOOptions(loss="rloo + gspo"), "different advantages"),
        (
            lambda: GRPOOptions(loss="reinforce", num_epochs=2),
            "'reinforce' takes no notice .* must be 1, got 2",
        ),
        (
            lambda: make_grpo_config(batch_size=3, grpo={"num_minibatches": 8}),
            "batch_size 3 x group_size 4 = 12 must be a multiple",
        ),
        (
            lambda: make_grpo_config(compute=ComputeOptions(microbatches=3)),
            "num_minibatches x microbatches = 3",
        ),
        (lambda: make_grpo_config(reward="a.py:f +"), "reward 'a.py:f \\+': expected"),
    ],
)
def test_what_grpo_refuses_names_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flags_of_grpo_are_flat_unique_and_hashable():
    names = leaves(GRPOConfig, set())
    assert {"group_size", "beta", "clip_eps_high", "scale_rewards", "loss"} <= names
    assert "whiten_rewards" not in names and "kl_coef" not in names
    hash(make_grpo_config())


def test_batch_size_counts_prompts():
    config = make_grpo_config()
    assert (config.batch_size, config.group_size, config.completions) == (4, 4, 16)


def test_a_reference_is_needed_for_the_kl_only():
    assert not make_grpo_config().has_reference
    assert make_grpo_config(grpo={"beta": 0.04}).has_reference


def test_the_default_of_grpo_is_trls():
    options = GRPOOptions()
    (term,) = options.terms().values()
    assert term.name == "dapo" and term.settings == {"clip_eps": 0.2}
    assert options.group_size == 8 and options.beta == 0 and options.num_epochs == 1
    assert options.reduction is losses.token_mean
    assert options.entry.advantages is losses.group_advantages


@pytest.mark.parametrize("name", REGISTRY["grpo"])
def test_every_loss_of_grpo_has_its_advantages_and_reduction(name):
    options = GRPOOptions(loss=name)
    assert callable(options.entry.advantages) and callable(options.reduction)


def test_flags_and_options_reach_the_loss():
    wide = GRPOOptions(loss="gspo", clip_eps=0.1, clip_eps_high=0.3)
    assert wide.terms()["gspo"].settings == {"clip_eps": 0.1, "clip_eps_high": 0.3}
    bound = GRPOOptions(loss="cispo:max_ratio=2").terms()["cispo"]
    assert bound.settings == {"max_ratio": 2.0}
    assert GRPOOptions(loss="0.5*grpo + gspo").terms()["grpo"].weight == 0.5
