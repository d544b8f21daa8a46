"""Tests for jalign/train/ppo_config.py."""

import dataclasses

import pytest

from jalign.train.online_config import OnlineConfig, SampleConfig
from jalign.train.ppo_config import (
    CriticConfig,
    KLConfig,
    PPOConfig,
    PPOOptions,
    ScoreOptions,
)
from tests.train.ppo_world import make_config


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
def test_contradictions_name_their_field(make, message):
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


def test_flags_are_flat_unique_and_hashable():
    assert {"kl_coef", "max_new_tokens", "learning_rate"} <= leaves(PPOConfig, set())
    hash(make_config())
