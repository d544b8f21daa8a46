"""The compiler's own account of the real training step."""

import functools
from typing import Any

import jax
import numpy as np

from jalign import sharding
from jalign.plan.estimate import build
from jalign.plan.table import PlanConfig, Row
from jalign.types import PreferenceBatch, Rollout, TokenBatch

PyTree = Any


def compile_step(config: PlanConfig, model_config, mesh) -> tuple[Row, ...]:
    """Bytes on each device of the training step, as the compiler lays it out.

    Args:
      mesh: of real devices, or of sharding.topology_devices.
    """
    from jalign.train.step import abstract_state, make_train_step

    model, tx = build(config, model_config, mesh)
    state = abstract_state(model.param_shapes(), tx, mesh=mesh)
    step = make_train_step(
        _objective(config, model),
        tx,
        microbatches=config.microbatches,
        state_shardings=sharding.state_shardings(mesh, state),
    )
    compiled = step.lower(state, _batch(config, mesh)).compile()  # type: ignore
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (
        Row("arguments", memory.argument_size_in_bytes, "parameters, moments, batch"),
        Row("outputs", outputs, "not in place of arguments"),
        Row("temporaries", memory.temp_size_in_bytes, "gradients, activations, ..."),
        Row("program", memory.generated_code_size_in_bytes, ""),
    )


def _objective(config: PlanConfig, model) -> Any:
    """The recipe's, with its default settings."""
    from jalign.train import objectives, policy_objectives
    from jalign.train.online_config import GRPOOptions

    grpo = GRPOOptions()
    make_grpo = functools.partial(
        policy_objectives.make_grpo_objective,
        terms=grpo.terms(),
        reduction=grpo.reduction,
        beta=grpo.beta,
    )
    make = {
        "sft": objectives.make_sft_objective,
        "reward": objectives.make_reward_objective,
        "dpo": objectives.make_dpo_objective,
        "ppo": policy_objectives.make_ppo_objective,
        "grpo": make_grpo,
    }
    return make[config.recipe](model)


def _batch(config: PlanConfig, mesh) -> PyTree:
    place = sharding.batch_sharding(mesh)

    def array(dtype, *shape) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    size: tuple[int, ...] = (config.batch_size, config.max_length)
    if config.recipe in ("reward", "dpo"):
        size = (config.batch_size, 2, config.max_length)
    ids, mask = array(np.int32, *size), array(np.bool_, *size)
    tokens = TokenBatch(ids, mask, ids, ids)
    if config.online:
        logps = array(np.float32, *size)
        values = logps if config.recipe == "ppo" else None
        return Rollout(*tokens, logps, logps, values, logps, values)
    if config.recipe == "sft":
        return tokens
    per_pair = array(np.float32, config.batch_size, 1)
    return PreferenceBatch(tokens, per_pair, per_pair, per_pair)
