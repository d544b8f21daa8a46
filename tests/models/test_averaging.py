"""Tests for jalign/models/averaging.py against float64 closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models import averaging
from jalign.models.averaging import (
    dare_linear,
    dare_ties,
    drop,
    linear,
    slerp,
    task_arithmetic,
    ties,
    trim,
)

RNG = np.random.default_rng(0)
BASE, *MODELS = RNG.normal(size=(4, 6, 5)).astype("f4")
WEIGHTS = (2.0, 0.5, 1.5)
TASKS = np.stack(MODELS).astype("f8") - BASE
KEY = jax.random.key(0)


def bits(x):
    return np.asarray(x).view("u4")


def weighted(arrays):
    return sum(w * x for w, x in zip(WEIGHTS, arrays, strict=True))


def test_linear_is_the_weighted_mean():
    want = weighted(np.stack(MODELS).astype("f8")) / 4
    np.testing.assert_allclose(linear(MODELS, weights=WEIGHTS), want, atol=1e-6)
    mean = np.mean(np.stack(MODELS).astype("f8"), 0)
    np.testing.assert_allclose(linear(MODELS), mean, atol=1e-6)


def test_linear_of_equal_models_is_the_model_bit_for_bit():
    x = np.append(RNG.normal(size=999), -0.0).astype("f4")
    for weights in (None, (0.1, 0.2, 0.7), (3, -1, 1)):
        np.testing.assert_array_equal(bits(linear([x] * 3, weights=weights)), bits(x))
    small = x[::-1] * np.float32(1e-5)
    got = linear([x, small], weights=(0, 1))
    np.testing.assert_array_equal(bits(got), bits(small))


def test_slerp_is_the_formula_and_goes_both_ways():
    u, v = np.float64(MODELS[0]), np.float64(MODELS[1])
    angle = np.arccos((u * v).sum() / np.sqrt((u**2).sum() * (v**2).sum()))
    want = (np.sin(0.7 * angle) * u + np.sin(0.3 * angle) * v) / np.sin(angle)
    np.testing.assert_allclose(slerp(MODELS[:2], t=0.3), want, atol=1e-6)
    back = slerp(MODELS[1::-1], t=0.7)
    np.testing.assert_allclose(back, want, atol=1e-6)
    # Between two of one length, that length stays.
    unit = [x / np.linalg.norm(x) for x in MODELS[:2]]
    assert np.linalg.norm(slerp(unit, t=0.4)) == pytest.approx(1, abs=1e-6)


def test_slerp_ends_in_its_inputs_bit_for_bit_and_is_linear_along_a_line():
    one, two = np.float32([1, -0.0, 3]), np.float32([-2, 5, 0.5])
    for t in (0, 1, 0.0, 1.0):
        got = slerp([one, two], t=t)
        np.testing.assert_array_equal(bits(got), bits(two if t else one))
    x = MODELS[0]
    for factor in (2.0, -2.0, 0.0):  # of the same direction, the opposite one, none
        got, want = slerp([x, factor * x], t=0.25), (0.75 + 0.25 * factor) * x
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_angles_of_large_arrays_are_not_lost_in_a_float32_sum():
    x = jnp.full((2**11, 2**12), 0.1)  # a running sum would be 1e-3 off
    want = np.float64(np.float32(0.1)) * x.size
    got = jax.jit(averaging._dot)(x, jnp.ones_like(x))
    assert got == pytest.approx(want, rel=1e-6)


def test_task_arithmetic_is_the_formula():
    got = task_arithmetic(MODELS, BASE, weights=WEIGHTS, scale=0.3)
    np.testing.assert_allclose(got, BASE + 0.3 * weighted(TASKS), atol=1e-6)
    away = task_arithmetic(MODELS[:1], BASE, weights=(-1,))
    np.testing.assert_allclose(away, BASE - TASKS[0], atol=1e-6)
    base = np.array([-0.0, 0.1], "f4")
    got = task_arithmetic([base, base], base)
    np.testing.assert_array_equal(bits(got), bits(base))


def test_ties_by_hand():
    base = np.ones(6, "f4")
    tasks = np.array(
        [
            # mean of both; the larger one's sign; a tie; one is 0; both; one left
            [4.0, -5, 3, 0, 0, 6],
            [2.0, 4, -3, -7, 0, -8],
            [0.0, 4, 0, 0, 0, 2],
        ]
    ).astype("f4")
    models = list(base + tasks)
    # Sums: 6, 3, 0 (counts as +), -7, 0, 0 (as +).
    want = [3, 4, 3, -7, 0, 4]
    np.testing.assert_array_equal(ties(models, base, density=1), base + want)
    got = ties(models, base, density=1, scale=2, weights=(1, 2, 0))
    # Sums: 8, 3, -3, -14, 0, -10; of the third model nothing counts.
    want = [(4 + 4) / 3, 4, -3, -7, 0, -8]
    np.testing.assert_allclose(got, base + 2 * np.array(want), rtol=1e-6)
    # Half of six are three: of the third task 0 is as large as the last of them.
    got = ties(models, base, density=0.5)
    want = [4, 4, -3, -7, 0, 6]
    trimmed = [[4, -5, 0, 0, 0, 6], [0, 4, 0, -7, 0, -8], [0, 4, 0, 0, 0, 2]]
    for task, kept in zip(tasks, trimmed, strict=True):
        np.testing.assert_array_equal(trim(jnp.asarray(task), 0.5), kept)
    want = [4, 4, 0, -7, 0, 4]
    np.testing.assert_array_equal(got, base + want)


def test_ties_is_the_formula():
    top = np.sort(np.abs(TASKS).reshape(3, -1))[:, -12]  # int(0.4 * 30) stay
    tasks = np.where(np.abs(TASKS) >= top[:, None, None], TASKS, 0)
    sign = np.where(weighted(tasks) >= 0, 1, -1)
    agree = np.sign(tasks) == sign
    total = weighted(agree.astype("f8"))
    mean = weighted(tasks * agree) / np.where(total == 0, 1, total)
    got = ties(MODELS, BASE, density=0.4, weights=WEIGHTS, scale=1.2)
    np.testing.assert_allclose(got, BASE + 1.2 * mean, atol=1e-6)


def test_ties_of_one_model_untrimmed_is_task_arithmetic():
    for scale in (1.0, 0.4):
        got = ties(MODELS[:1], BASE, density=1, scale=scale)
        want = task_arithmetic(MODELS[:1], BASE, scale=scale)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.99, 1])
def test_trim_keeps_the_largest_of_any_size(density):
    task = RNG.normal(size=(7, 11)) * 10.0 ** RNG.integers(-30, 30, (7, 11))
    task = task.astype("f4")
    count = max(1, int(density * task.size))
    want = np.where(np.abs(task) >= np.sort(np.abs(task), None)[-count], task, 0)
    np.testing.assert_array_equal(trim(jnp.asarray(task), density), want)


def test_drop_keeps_the_mean():
    """Over 1,000 keys: within five standard errors, and the share is the density."""
    task, density = jnp.asarray([2.0, -1.0, 0.0, 0.5]), 0.25
    keys = jax.random.split(KEY, 1000)
    got = np.asarray(jax.vmap(lambda key: drop(task, density, key))(keys))
    error = np.abs(task) * np.sqrt((1 - density) / density / 1000)
    assert (np.abs(got.mean(0) - task) <= 5 * error).all()
    assert {*np.unique(got[:, 0])} == {0, 8}
    np.testing.assert_array_equal(drop(task, 1, KEY), task)


def test_dare_is_what_drop_leaves():
    keys = [jax.random.fold_in(KEY, i) for i in range(3)]
    how = dict(key=KEY, density=0.5, weights=WEIGHTS, scale=0.3)
    tasks = [
        np.float64(drop(jnp.float32(x), 0.5, k))
        for x, k in zip(TASKS, keys, strict=True)
    ]
    got, added = dare_linear(MODELS, BASE, **how), weighted(tasks)
    np.testing.assert_allclose(got, BASE + 0.3 * added, atol=1e-5)
    sign = np.where(added >= 0, 1, -1)
    agreed = weighted([task * (np.sign(task) == sign) for task in tasks])
    got = dare_ties(MODELS, BASE, **how)
    np.testing.assert_allclose(got, BASE + 0.3 * agreed, atol=1e-5)
    whole = dare_linear(MODELS, BASE, key=KEY, density=1)
    np.testing.assert_allclose(whole, task_arithmetic(MODELS, BASE), atol=1e-6)
    other = dare_linear(MODELS, BASE, **how | {"key": keys[0]})
    assert (np.asarray(other) != dare_linear(MODELS, BASE, **how)).any()


ALL = {
    "linear": lambda models, base: linear(models),
    "slerp": lambda models, base: slerp(models[:2], t=0.3),
    "task_arithmetic": task_arithmetic,
    "ties": functools.partial(ties, density=0.4),
    "dare_ties": functools.partial(dare_ties, key=KEY, density=0.4),
}


@pytest.mark.parametrize("name", ALL)
def test_jit_and_a_mesh_change_nothing_and_half_precision_is_widened(name):
    models, base = [x[:4, :4] for x in MODELS], BASE[:4, :4]
    want = ALL[name](models, base)
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    placed = jax.device_put((models, base), sharding.batch_sharding(mesh))
    for given in ((models, base), placed):
        got = jax.jit(ALL[name])(*given)
        np.testing.assert_allclose(got, want, atol=1e-6)
    half = jax.tree.map(jnp.bfloat16, (models, base))
    wide = jax.tree.map(lambda x: x.astype("f4"), half)
    got = ALL[name](*half)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, ALL[name](*wide))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(MODELS, weights=(1, 2)), "2 for 3 models"),
        (lambda: linear(MODELS, weights=(1, -1, 0)), "not positive"),
        (lambda: slerp(MODELS), "of two models, got 3"),
        (lambda: ties(MODELS, BASE, weights=(1, 1, -1)), "one is negative"),
        (lambda: ties(MODELS, BASE, density=0), r"density must be in \(0, 1\]"),
        (lambda: dare_linear(MODELS, BASE, key=KEY, density=1.5), "got 1.5"),
        (lambda: linear([MODELS[0], MODELS[1][0]]), "shapes"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
