"""Schedules, decay mask, clipping, and what each optimizer does to which parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.train import optim
from jalign.train.optim import OptimConfig
from tests.train import tiny


@pytest.mark.parametrize(
    "schedule, end, expected",
    [
        ("constant", 0.0, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0.0, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("cosine", 0.5, [1 / 3, 2 / 3, 1, 0.875, 0.625]),
    ],
)
def test_schedules(schedule, end, expected):
    config = OptimConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=2, end_fraction=end
    )
    fn = optim.make_schedule(config, 5)
    np.testing.assert_allclose([fn(i) for i in range(5)], expected, rtol=1e-5)


def test_contradictions_name_both_fields():
    for wrong, names in [
        (dict(schedule="constant", end_fraction=0.1), ("schedule", "end_fraction")),
        (dict(optimizer="adam", weight_decay=0.1), ("adam", "weight_decay")),
    ]:
        with pytest.raises(ValueError) as error:
            OptimConfig(**wrong)
        assert all(name in str(error.value) for name in names)
    with pytest.raises(ValueError, match="warmup_steps 5 .* 5 steps"):
        optim.make_schedule(OptimConfig(warmup_steps=5), 5)


def updates(config, grads_of=jnp.ones_like):
    params = jax.tree.map(
        lambda s: jnp.ones(s.shape, s.dtype), tiny.model().param_shapes()
    )
    tx, _ = optim.make_optimizer(config, 10)
    grads = jax.tree.map(grads_of, params)
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def test_weight_decay_takes_matrices_only():
    settings = dict(learning_rate=1.0, max_grad_norm=0.0)
    decayed = updates(OptimConfig(**settings, weight_decay=0.5), jnp.zeros_like)
    for path, leaf in jax.tree_util.tree_leaves_with_path(decayed):
        expected = 0.0 if path[-1].key in ("scale", "bias") else -0.5
        np.testing.assert_allclose(leaf, expected, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("name", ["adamw", "adam", "adafactor", "muon"])
def test_every_optimizer_moves_every_parameter(name):
    key = jax.random.key(0)
    moved = updates(
        OptimConfig(learning_rate=1.0, optimizer=name),
        lambda p: jax.random.normal(key, p.shape),
    )
    for leaf in jax.tree.leaves(moved):
        rms = float(jnp.sqrt(jnp.mean(leaf**2)))
        assert np.isfinite(rms) and 0.05 < rms < 2


def test_muon_makes_layer_matrices_orthogonal():
    key = jax.random.key(0)
    moved = updates(
        OptimConfig(learning_rate=1.0, optimizer="muon"),
        lambda p: jax.random.normal(key, p.shape),
    )
    for layer in np.asarray(moved["layers"]["mlp"]["up"]["kernel"]):
        values = np.linalg.svd(layer, compute_uv=False)
        # Newton-Schulz leaves singular values near 1, times 0.2 sqrt(longest side).
        assert np.all(np.abs(values / (0.2 * 48**0.5) - 1) < 0.5)


def test_current_learning_rate_follows_the_count_of_updates():
    tx, schedule = optim.make_optimizer(OptimConfig(learning_rate=1.0), 4)
    params = {"kernel": jnp.ones(3)}
    state = tx.init(params)
    assert float(optim.current_learning_rate(state, schedule)) == 1.0
    _, state = tx.update(params, state, params)
    assert float(optim.current_learning_rate(state, schedule)) == 0.75
