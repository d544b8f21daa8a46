"""Optimizers: one optax chain from one config.

Order of the chain: clip the global norm, scale by the optimizer's statistics, add
decoupled weight decay (matrices only), scale by the learning-rate schedule.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jalign.models import tensors
from jalign.settings import check
from jalign.train.config import OptimConfig

PyTree = Any


def depends_on_length(config: OptimConfig) -> bool:
    """Whether the learning rate of a step depends on the number of steps of the run."""
    return config.schedule != "constant" and config.end_fraction < 1


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far (int [] -> f32).

    The first update already moves: with W warm-up steps it takes peak / (W + 1).

    Raises: ValueError when the warm-up is not shorter than the run.
    """
    peak, end = config.learning_rate, config.learning_rate * config.end_fraction
    warmup = config.warmup_steps
    check(
        warmup < max(total_steps, 1),
        f"warmup_steps {warmup} must be less than the run's {total_steps} steps",
    )
    rest = max(total_steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.end_fraction),
    }[config.schedule]()
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimConfig, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax transformation of a config and its schedule.

    Args:
      config: what the user picked.
      total_steps: number of updates of the whole run (the schedule's length).

    Returns: (tx, schedule); schedule maps the number of updates made to the rate.
    """
    schedule = make_schedule(config, total_steps)
    clip = [optax.clip_by_global_norm(config.max_grad_norm)]
    decay = [optax.add_decayed_weights(config.weight_decay, mask=decay_mask)]
    tx = optax.chain(
        *(clip if config.max_grad_norm else []),
        _SCALE_BY[config.optimizer](config),
        *(decay if config.weight_decay else []),
        optax.scale_by_learning_rate(schedule),
    )
    return tx, schedule


def current_learning_rate(opt_state: PyTree, schedule: optax.Schedule) -> jax.Array:
    """The rate of the next update: the schedule at the optimizer's own count.

    Skipped steps (see step.py) do not advance that count, so it is not state.step.
    """
    counts = optax.tree_utils.tree_get_all_with_path(
        opt_state,
        "count",
        filtering=lambda path, _: (
            getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
        ),
    )
    if not counts:
        raise ValueError("this optimizer holds no schedule: pass schedule=None")
    return jnp.asarray(schedule(counts[0][1]))


def _by_path(function: Callable[[str, Any], Any], params: PyTree) -> PyTree:
    """function(path, leaf) of every leaf; a path is as in models.tensors."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf
        ),
        params,
    )


def decay_mask(params: PyTree) -> PyTree:
    """True for matrices (kernel, embedding), False for norm scales and biases.

    By name, since layers are stacked: a stacked bias has three axes.
    """
    return _by_path(lambda path, _: tensors.is_matrix(path), params)


def muon_dimensions(params: PyTree) -> PyTree:
    """Which axes of each parameter make the matrix that Muon orthogonalizes.

    Layers and, for the output projection, heads are laid out as in jalign.models:
    axis 0 is a batch of matrices. None (so: Adam) for everything outside the layers,
    norm scales and biases. (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)
    """

    def of(path, leaf):
        if not tensors.is_linear(path):
            return None
        last = 1 + tensors.inputs_of(path)
        inputs, outputs = tuple(range(1, last)), tuple(range(last, leaf.ndim))
        return optax.contrib.MuonDimensionNumbers(inputs, outputs)

    return _by_path(of, params)


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _scale_by_adafactor(config: OptimConfig) -> optax.GradientTransformation:
    del config  # b1, b2 and eps are Adam's.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _scale_by_muon(config: OptimConfig) -> optax.GradientTransformation:
    def is_spec(x):
        return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)

    def labels(params):
        return jax.tree.map(
            lambda spec: "adam" if spec is None else "muon",
            muon_dimensions(params),
            is_leaf=is_spec,
        )

    def scale_by_muon():
        # 0.2 sqrt(max(fan_in, fan_out)) gives updates of Adam's RMS, so that one
        # learning rate serves both groups (Liu et al. 2025, arXiv:2502.16982).
        return optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=muon_dimensions),
            optax.stateless(_match_adam_rms),
        )

    return optax.partition(
        {"muon": scale_by_muon(), "adam": _scale_by_adam(config)}, labels
    )


def _match_adam_rms(updates: PyTree, params: PyTree) -> PyTree:
    del params
    dims = muon_dimensions(updates)

    def scale(update, spec):
        if spec is None:
            return update
        sides = [
            math.prod(update.shape[axis] for axis in axes)
            for axes in (spec.reduction_axis, spec.output_axis)
        ]
        return update * (0.2 * max(sides) ** 0.5)

    return jax.tree.map(scale, updates, dims)


_SCALE_BY = {
    "adamw": _scale_by_adam,
    "adam": _scale_by_adam,
    "adafactor": _scale_by_adafactor,
    "muon": _scale_by_muon,
}
