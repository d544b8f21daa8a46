"""Tests for jalign/train/online_config.py; PPO's and GRPO's own are beside it."""

import pytest

from jalign.train.online_config import (
    OnlineOptions,
    SampleConfig,
    ScoreLimits,
)
from jalign.train.run_config import ComputeOptions
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
