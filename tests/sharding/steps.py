"""A few training steps of a tiny model on any mesh; the data are always the same."""

import jax
import numpy as np

from jalign import models, sharding
from jalign.train.objectives import make_dpo_objective, make_sft_objective
from jalign.train.optim import OptimConfig, make_optimizer
from jalign.train.step import init_state, make_train_step
from jalign.types import PreferenceBatch, TokenBatch

ROWS, LENGTH, STEPS = 8, 16, 3
# Uneven head sizes; no key bias, whose true gradient is 0, so that Adam would step
# by the sign of the rounding error.
CONFIG = models.ModelConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


def _tokens(rng) -> TokenBatch:
    """Rows of unequal length, of which the second half is trained."""
    lengths = rng.integers(4, LENGTH + 1, ROWS)
    index = np.arange(LENGTH)[None, :]
    inside = index < lengths[:, None]
    return TokenBatch(
        np.where(inside, rng.integers(0, 32, (ROWS, LENGTH)), 0).astype(np.int32),
        inside & (index >= lengths[:, None] // 2),
        inside.astype(np.int32),
        np.where(inside, index, 0).astype(np.int32),
    )


def _batch(recipe: str, step: int):
    rng = np.random.default_rng(step)
    if recipe == "sft":
        return _tokens(rng)
    logps = rng.normal(-20, 2, (2, ROWS, 1)).astype(np.float32)
    zeros = np.zeros((ROWS, 1), np.float32)
    rows = [np.stack(x, axis=1) for x in zip(_tokens(rng), _tokens(rng), strict=True)]
    rows = TokenBatch(*rows)
    ids = rows.segment_ids * np.array([[1], [2]], np.int32)
    return PreferenceBatch(rows._replace(segment_ids=ids), zeros, *logps)


def train(
    recipe: str,
    mesh,
    microbatches: int = 1,
    config: models.ModelConfig = CONFIG,
    attention: str = "auto",
) -> dict[str, list[float]]:
    """{"loss": of each step, "params": all parameters in one row}, as plain floats."""
    model = models.Model(config, mesh=mesh, attention=attention)
    make = {"sft": make_sft_objective, "dpo": make_dpo_objective}[recipe]
    # eps well above the rounding error of gradients, which Adam would else magnify.
    settings = OptimConfig(learning_rate=1e-3, weight_decay=0.1, eps=1e-5)
    tx, _ = make_optimizer(settings, STEPS)
    params = model.init(jax.random.key(0))
    state = init_state(params, tx, jax.random.key(1), mesh=mesh)
    pinned = None if mesh is None else sharding.state_shardings(mesh, state)
    step = make_train_step(
        make(model), tx, microbatches=microbatches, state_shardings=pinned
    )
    index, count = (0, 1) if mesh is None else sharding.process_slice(mesh)
    mine = slice(index * ROWS // count, (index + 1) * ROWS // count)
    losses = []
    for number in range(STEPS):
        rows = jax.tree.map(lambda x: x[mine], _batch(recipe, number))
        state, metrics = step(state, sharding.put_batch(rows, mesh))
        losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves(sharding.gather(state.params))
    params = np.concatenate([leaf.ravel() for leaf in leaves])
    return {"loss": losses, "params": params.tolist()}
