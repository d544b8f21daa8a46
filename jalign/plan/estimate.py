"""The estimate: exact bytes of states by eval_shape, formulas for the rest."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jalign import sharding
from jalign.plan.table import Plan, PlanConfig, Row

PyTree = Any


def build(config: PlanConfig, model_config, mesh) -> tuple[Any, Any]:
    """(trained models.Model, optax transformation) of a config."""
    from jalign import models
    from jalign.train import optim

    dtype = jnp.dtype(config.dtype)
    model = models.Model(model_config, mesh=mesh, dtype=dtype, remat=config.remat)
    if config.recipe == "reward" and not model_config.num_labels:
        model = model.with_scalar_head()
    if config.shared_trunk:
        model = model.replace(value_head=True)
    settings = optim.OptimConfig(optimizer=config.optimizer, weight_decay=0.0)
    return model, optim.make_optimizer(settings, total_steps=100)[0]


def estimate(config: PlanConfig, model_config, mesh, machine: sharding.Machine) -> Plan:
    """The plan of a config on an abstract mesh.

    Raises: ValueError where the mesh does not divide the model or the batch.
    """
    model, tx = build(config, model_config, None)
    shapes = model.param_shapes()
    resident = _trained(mesh, shapes, tx, "policy " if config.online else "")
    transient = {"update": _update(config, model, mesh)}
    if config.recipe == "ppo" and not config.shared_trunk:
        critic = model.with_scalar_head()
        resident += _trained(mesh, critic.param_shapes(), tx, "critic ")
    if config.online:
        weights = _shard_bytes(shapes, sharding.param_shardings(mesh, shapes))
        frozen = "float32, frozen" + (
            "; 0 with beta 0" if config.recipe == "grpo" else ""
        )
        resident += [
            Row("reference parameters", weights, frozen),
            Row("reward model", weights, "if as large as the policy; 0 for a function"),
        ]
        transient["rollout"] = _rollout(config, model, mesh)
    return Plan(
        config,
        machine,
        dict(mesh.shape),
        sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        tuple(resident),
        {phase: tuple(rows) for phase, rows in transient.items()},
    )


def _trained(mesh, shapes, tx, prefix: str) -> list[Row]:
    """Exact rows of a model under training."""
    from jalign.train.step import abstract_state

    state = abstract_state(shapes, tx)
    placed = sharding.state_shardings(mesh, state)
    weights = _shard_bytes(state.params, placed.params)
    moments = _shard_bytes(state.opt_state, placed.opt_state)
    return [
        Row(f"{prefix}parameters", weights, "float32"),
        Row(f"{prefix}optimizer state", moments, "float32"),
    ]


def _shard_bytes(shapes: PyTree, shardings: PyTree) -> int:
    def size(leaf, placed):
        return math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))


def _update(config, model, mesh) -> list[Row]:
    """What a training step needs on top: exact gradients, estimated activations."""
    c = model.config
    rows, tensor = _local_rows(config, mesh), mesh.shape["tensor"]
    shapes = model.param_shapes()
    weights = _shard_bytes(shapes, sharding.param_shardings(mesh, shapes))
    width = jnp.dtype(config.dtype).itemsize
    tokens = rows * config.max_length
    # Inside a layer: norms and residuals; q, k, v and output; gate, up and product.
    heads = 2 * c.num_heads + 2 * c.num_kv_heads
    inner = 4 * c.hidden_size + (heads * c.head_dim + 3 * c.intermediate_size) / tensor
    layers = 2 if config.remat else 1 + c.num_layers  # 2: values and cotangents
    stack = tokens * c.hidden_size * width * c.num_layers if config.remat else 0
    copies = 1 if config.microbatches == 1 else 2
    layer = sum(x.size for x in jax.tree.leaves(shapes["layers"])) / c.num_layers
    whole = 2 * layer / tensor * width if mesh.shape["fsdp"] > 1 else 0
    result = [
        Row("gradients", copies * weights, f"float32, {copies} set(s)"),
        Row("layer inputs", int(stack), f"{rows} rows, kept by remat"),
        Row("inside layers", int(tokens * inner * width * layers), "estimate"),
        Row("gathered weights", int(whole), "two layers, estimate"),
    ]
    return result + ([] if c.num_labels else _logit_rows(config, model, mesh))


def _logit_rows(config, model, mesh) -> list[Row]:
    from jalign.losses.chunked import DEFAULT_CHUNK_SIZE

    c, tensor = model.config, mesh.shape["tensor"]
    tokens = min(DEFAULT_CHUNK_SIZE, config.batch_size * config.max_length)
    share = max(1, tokens // (mesh.size // tensor))
    table = c.hidden_size * c.vocab_size // tensor
    width = jnp.dtype(config.dtype).itemsize
    return [
        Row("logits of a chunk", 3 * share * c.vocab_size // tensor * 4, "float32 x 3"),
        Row("unembedding", table * (width + 4), "gathered, and its gradient"),
    ]


def _rollout(config, model, mesh) -> list[Row]:
    """What sampling needs on top of the resident arrays."""
    c = model.config
    tensor = mesh.shape["tensor"]
    kv_heads = c.num_kv_heads // tensor if c.num_kv_heads % tensor == 0 else 0
    rows = -(-config.batch_size * tensor // mesh.size)
    width = jnp.dtype(config.dtype).itemsize
    slots = rows * config.max_length * c.num_layers
    cache = 2 * slots * (kv_heads or c.num_kv_heads) * c.head_dim * width
    logits = rows * c.vocab_size // tensor * 4
    return [
        Row("KV cache", cache, f"{rows} rows x {config.max_length} slots"),
        Row("sampling logits", 3 * logits, "float32 x 3"),
    ]


def _local_rows(config, mesh) -> int:
    """Rows of a micro-batch that one device holds; pairs are two rows."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % ways:
        raise ValueError(
            f"batch_size {config.batch_size} is not a multiple of data*fsdp = {ways}, "
            f"mesh {dict(mesh.shape)}"
        )
    pair = 2 if config.recipe in ("reward", "dpo") else 1
    return -(-pair * config.batch_size // (config.microbatches * ways))
