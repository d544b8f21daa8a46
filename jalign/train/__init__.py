"""Training: objectives, the step, optimizers, checkpoints, metrics, and the recipes.

The recipes (`run_sft`, ...) read data and write reports, so they load when first used;
the parts below them load with the package and need nothing but jax and optax.
"""

import importlib
from typing import TYPE_CHECKING

from jalign.forward import make_reference_fn
from jalign.train.checkpoint import Checkpointer
from jalign.train.config import (
    ComputeOptions,
    DPOConfig,
    DPOOptions,
    RewardConfig,
    RewardOptions,
    RunConfig,
    SFTConfig,
    SFTOptions,
)
from jalign.train.evaluations import Callbacks
from jalign.train.loop import Diverged, Preempted, fit
from jalign.train.loss_spec import parse_losses
from jalign.train.metrics import MetricsWriter
from jalign.train.objectives import (
    make_dpo_objective,
    make_reward_objective,
    make_sft_objective,
    with_router_loss,
)
from jalign.train.online_config import (
    GRPOConfig,
    GRPOOptions,
    PPOConfig,
    PPOOptions,
    SampleConfig,
)
from jalign.train.optim import OptimConfig, make_optimizer
from jalign.train.policy_objectives import (
    make_grpo_objective,
    make_ppo_objective,
    make_value_objective,
)
from jalign.train.step import abstract_state, init_state, make_train_step

if TYPE_CHECKING:
    from jalign.train.offline import run_dpo, run_reward, run_sft
    from jalign.train.online import run_grpo, run_ppo

__all__ = [
    "Callbacks",
    "Checkpointer",
    "ComputeOptions",
    "DPOConfig",
    "DPOOptions",
    "Diverged",
    "GRPOConfig",
    "GRPOOptions",
    "MetricsWriter",
    "OptimConfig",
    "PPOConfig",
    "PPOOptions",
    "Preempted",
    "RewardConfig",
    "RewardOptions",
    "RunConfig",
    "SFTConfig",
    "SFTOptions",
    "SampleConfig",
    "abstract_state",
    "fit",
    "init_state",
    "make_dpo_objective",
    "make_grpo_objective",
    "make_optimizer",
    "make_ppo_objective",
    "make_reference_fn",
    "make_reward_objective",
    "make_sft_objective",
    "make_train_step",
    "make_value_objective",
    "parse_losses",
    "run_dpo",
    "run_grpo",
    "run_ppo",
    "run_reward",
    "run_sft",
    "with_router_loss",
]


def __getattr__(name: str):
    if name in ("run_dpo", "run_reward", "run_sft"):
        return getattr(importlib.import_module("jalign.train.offline"), name)
    if name in ("run_grpo", "run_ppo"):
        return getattr(importlib.import_module("jalign.train.online"), name)
    raise AttributeError(f"module 'jalign.train' has no attribute {name!r}")
