"""Tests for jalign/losses/chunked.py: one pass gives the loss and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.losses import entropy_from_logits, logps_from_logits
from jalign.losses.chunked import sum_over_logits
from tests.hlo import largest_buffer
from tests.losses.test_chunked import (
    HIDDEN,
    MASK,
    SPECS,
    TARGETS,
    UNEMBED,
    V,
    compiled,
    spread,
)


def rows_of(logits, targets):
    return -logps_from_logits(logits, targets), entropy_from_logits(logits)


def fused(hidden, unembed, targets, mask, chunk_size=32):
    total, entropy = sum_over_logits(
        rows_of, hidden, unembed, targets, mask, chunk_size=chunk_size
    )
    return 3.0 * total, entropy


def plain(hidden, unembed, targets, mask):
    loss, entropy = rows_of(hidden @ unembed, targets)
    total = 3.0 * jnp.sum(jnp.where(mask, loss, 0.0))
    return total, jnp.where(mask, entropy, 0.0)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1000])
def test_a_sum_over_logits_is_the_sum_of_the_loss(chunk_size):
    args = HIDDEN[:5, :9], UNEMBED, TARGETS[:5, :9], MASK[:5, :9]
    function = functools.partial(fused, chunk_size=chunk_size)
    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*args)
        for f in (function, plain)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, got, want)
    jax.tree.map(close, jax.jit(function)(*args), want[0])


def test_a_sum_over_logits_holds_no_more_than_a_chunk_of_them():
    gradient = jax.value_and_grad(fused, (0, 1), has_aux=True)
    hlo = compiled(gradient, HIDDEN, UNEMBED, TARGETS, MASK)
    assert largest_buffer(hlo) <= 2 * 32 * V


@pytest.mark.parametrize("split", SPECS)
def test_a_sum_over_logits_on_eight_devices(split):
    args = HIDDEN, UNEMBED, TARGETS, MASK
    grad = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))
    got, want = grad(*spread(split, *args)), grad(*args)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, got, want)
    if split == "batch":
        hlo = compiled(grad, *spread(split, *args))
        assert "all-gather" not in hlo and "all-to-all" not in hlo


def test_no_gradient_flows_through_what_a_sum_over_logits_reports():
    def entropies(hidden):
        return jnp.sum(fused(hidden, UNEMBED, TARGETS, MASK)[1])

    assert not np.any(jax.grad(entropies)(HIDDEN))


def test_no_gradient_flows_to_the_rows():
    def of(weights):
        def row_fn(logits, weights):
            return weights * logits.max(-1), ()

        return sum_over_logits(row_fn, HIDDEN, UNEMBED, weights, MASK)[0]

    assert not np.any(jax.grad(of)(jnp.ones(MASK.shape)))


def test_bad_arguments_are_refused():
    with pytest.raises(AssertionError):
        fused(HIDDEN, UNEMBED, TARGETS, 1.0 * MASK)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        fused(HIDDEN, UNEMBED, TARGETS, MASK, chunk_size=0)
