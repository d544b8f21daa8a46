"""A tiny GRPO run in the world of tests/train/ppo_world.py."""

from jalign.train.online_config import GRPOConfig, GRPOOptions, SampleConfig
from jalign.train.online_models import OnlineModels
from jalign.train.optim import OptimConfig
from tests.train.ppo_world import make_models


def make_grpo_config(out="out", *, sampling=None, grpo=None, **changes) -> GRPOConfig:
    options = {
        "group_size": 4,
        "num_epochs": 2,
        "sampling": SampleConfig(max_new_tokens=8, **(sampling or {})),
    } | (grpo or {})
    fields = {
        "model": "model",
        "data": "prompts.jsonl",
        "reward": "reward.py:share_of_a",
        "steps": 3,
        "batch_size": 4,
        "max_length": 16,
        "mesh": "fsdp=1",
        "optim": OptimConfig(learning_rate=3e-3, schedule="constant"),
    } | changes
    return GRPOConfig(out=str(out), grpo=GRPOOptions(**options), **fields)


def make_group_models(mesh=None) -> OnlineModels:
    made = make_models(mesh=mesh)
    models, params = ({"policy": x["policy"]} for x in (made.models, made.params))
    return made._replace(models=models, params=params)
