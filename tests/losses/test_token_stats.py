"""Tests for jalign/losses/logps.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jalign.losses import accuracy_from_logits, token_accuracy, token_entropy
from tests.losses.oracle import assert_matches, log_softmax
from tests.losses.test_chunked import (
    HIDDEN,
    TARGETS,
    UNEMBED,
    B,
    T,
    V,
    compiled,
    largest_buffer,
)


def entropy_sum(hidden, unembed, _, chunk_size=32):
    return token_entropy(hidden, unembed, chunk_size=chunk_size).sum()


def accuracy_sum(*args, chunk_size=32):
    return token_accuracy(*args, chunk_size=chunk_size).sum()


def test_entropy_matches_float64_closed_form():
    def oracle(hidden, unembed):
        log_p = log_softmax(2 * np.tanh(hidden @ unembed / 2) / 0.8)
        return -(np.exp(log_p) * log_p).sum(-1)

    options = {"temperature": 0.8, "softcap": 2.0, "chunk_size": 4}
    assert_matches(
        lambda h, w: token_entropy(h, w, **options),
        oracle,
        [HIDDEN[:2, :3], UNEMBED[:, :6]],
        (0, 1),
    )


def test_accuracy_is_that_of_argmax():
    best = np.argmax(HIDDEN @ UNEMBED, -1).astype(np.int32)
    targets = np.where(np.arange(T) % 3, best, TARGETS).astype(np.int32)
    got = token_accuracy(HIDDEN, UNEMBED, targets, chunk_size=7)
    np.testing.assert_array_equal(got, (best == targets).astype("f4"))


def test_of_equal_logits_the_first_is_right():
    logits = np.float32([[1, 2, 2], [0, 0, 0], [-np.inf, 3, 3]])
    for target, want in [(0, [0, 1, 0]), (1, [1, 0, 1]), (2, [0, 0, 0])]:
        got = accuracy_from_logits(logits, np.full(3, target, "i4"))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("function", [entropy_sum, accuracy_sum])
def test_no_buffer_holds_all_logits_and_no_split_vocabulary_is_collected(function):
    args = HIDDEN, UNEMBED, TARGETS
    grad = jax.value_and_grad(function, (0, 1))
    assert largest_buffer(compiled(grad, *args)) <= 2 * 32 * V
    whole = functools.partial(function, chunk_size=B * T)
    assert largest_buffer(compiled(whole, *args)) >= B * T * V
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = P(), P(None, "data"), P()
    split = jax.device_put(args, tuple(NamedSharding(mesh, s) for s in specs))
    assert "all-gather" not in compiled(function, *split)
    np.testing.assert_allclose(jax.jit(function)(*split), function(*args), rtol=1e-5)
    assert function(*args).dtype == jnp.float32


def test_the_gradient_of_a_metric_computes_no_logits_again():
    def products(function):
        jaxpr = jax.make_jaxpr(function)(HIDDEN, UNEMBED, TARGETS)
        return str(jaxpr).count("dot_general")

    assert products(accuracy_sum) > 0
    assert products(jax.grad(accuracy_sum, (0, 1))) == products(accuracy_sum)


def test_temperature_is_1_by_default():
    hidden, unembed = HIDDEN[:2, :3], UNEMBED[:, :6]
    log_p = log_softmax(hidden.astype("f8") @ unembed)
    got = token_entropy(hidden, unembed)
    np.testing.assert_allclose(got, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4)
