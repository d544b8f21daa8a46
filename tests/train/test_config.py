import dataclasses

import pytest

from jalign.train import config
from jalign.train.config import DPOConfig, RewardConfig, SFTConfig, SFTOptions
from jalign.train.optim import OptimConfig
from jalign.train.ppo_config import ComputeOptions

HERE = dict(model="m", data="d", out="o")


def test_at_most_15_fields_each():
    for value in vars(config).values():
        if dataclasses.is_dataclass(value):
            assert len(dataclasses.fields(value)) <= 15, value
    for recipe in (SFTConfig, RewardConfig, DPOConfig):
        assert dataclasses.is_dataclass(recipe(**HERE).optim)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(batch_size=0), "batch_size must be >= 1"),
        (dict(steps=0), "steps must be >= 1"),
        (dict(steps=3, optim=OptimConfig(warmup_steps=3)), "warmup_steps 3 .* steps 3"),
        (
            dict(batch_size=8, sft=SFTOptions(compute=ComputeOptions(microbatches=3))),
            "microbatches 3 does not divide batch_size 8",
        ),
    ],
)
def test_contradictions_name_the_fields(wrong, words):
    with pytest.raises(ValueError, match=words):
        SFTConfig(**HERE, **wrong)
