"""Tests for jalign/losses/chunked.py: no [B, T, V], on one device or eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jalign.losses import (
    entropy_from_logits,
    logps_from_logits,
    map_logits,
    token_logps,
)
from jalign.losses.chunked import DEFAULT_CHUNK_SIZE, Static
from tests.hlo import largest_buffer
from tests.tolerance import assert_trees_close

B, T, D, V = 8, 32, 8, 512
SUM_LENGTH = D + V + B * T  # logits, their log-sum-exp, then all tokens
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(B, T, D)).astype(np.float32)
UNEMBED = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, size=(B, T)).astype(np.int32)


def total(hidden, unembed, targets, chunk_size=32):
    both = token_logps(
        hidden, unembed, targets, chunk_size=chunk_size, return_entropy=True
    )
    return sum(jnp.sum(jnp.sin(x)) for x in both)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.parametrize("function", [total, jax.value_and_grad(total, (0, 1))])
def test_no_compiled_buffer_is_as_large_as_all_logits(function):
    hlo = compiled(function, HIDDEN, UNEMBED, TARGETS)
    assert largest_buffer(hlo) <= 2 * 32 * V  # a chunk's logits, not B * T * V
    whole = compiled(
        functools.partial(total, chunk_size=B * T), HIDDEN, UNEMBED, TARGETS
    )
    assert largest_buffer(whole) >= B * T * V  # so the measure would have seen it


@pytest.mark.parametrize(
    ("b", "t", "chunk_size"),
    [(1, 7, 2), (7, 1, 2), (7, 1, 3), (5, 3, 1), (5, 3, 4), (5, 3, 7), (3, 5, 100)],
)
def test_any_chunk_size_gives_the_same(b, t, chunk_size):
    args = HIDDEN[:b, :t], UNEMBED, TARGETS[:b, :t]
    chunked = functools.partial(total, chunk_size=chunk_size)

    def whole(h, w, y):
        logits = h @ w
        both = logps_from_logits(logits, y), entropy_from_logits(logits)
        return sum(jnp.sum(jnp.sin(x)) for x in both)

    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(*args) for f in (chunked, whole)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, got, want)


SPECS = {
    "batch": (P("data"), P(), P("data")),
    "vocabulary": (P(), P(None, "data"), P()),
    "embed": (P("data"), P("data"), P("data")),
}


def spread(split, *args):
    """hidden, unembed and arrays cut like the targets, over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    hidden, unembed, others = SPECS[split]
    specs = hidden, unembed, *[others] * (len(args) - 2)
    return jax.device_put(args, tuple(NamedSharding(mesh, spec) for spec in specs))


@pytest.mark.parametrize("split", SPECS)
def test_eight_devices_give_the_same(split):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    args = HIDDEN, UNEMBED, TARGETS
    shardings = tuple(NamedSharding(mesh, spec) for spec in SPECS[split])
    grad = jax.jit(jax.value_and_grad(total, (0, 1)))
    got, want = grad(*jax.device_put(args, shardings)), grad(*args)
    assert_trees_close(got, want, n=SUM_LENGTH)


def test_a_split_batch_keeps_its_hidden_states_where_they_are():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shardings = tuple(NamedSharding(mesh, spec) for spec in SPECS["batch"])
    args = jax.device_put((HIDDEN, UNEMBED, TARGETS), shardings)
    hlo = compiled(jax.value_and_grad(total, (0, 1)), *args)
    assert "all-gather" not in hlo and "all-to-all" not in hlo
    assert largest_buffer(hlo) <= D * V  # each device holds an eighth of a chunk


def test_a_split_vocabulary_is_not_collected():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shardings = tuple(NamedSharding(mesh, spec) for spec in SPECS["vocabulary"])
    args = jax.device_put((HIDDEN, UNEMBED, TARGETS), shardings)
    assert "all-gather" not in compiled(total, *args)


def test_equal_functions_are_traced_once():
    traces = []

    def row_fn(logits, rows, consts, *, scale):
        traces.append(scale)
        return scale * logits.max(-1)

    @jax.jit
    def run(h):
        fn = functools.partial(row_fn, scale=2.0)
        return map_logits(fn, h, UNEMBED)

    np.testing.assert_allclose(run(HIDDEN), 2 * (HIDDEN @ UNEMBED).max(-1), rtol=1e-5)
    run(HIDDEN)
    assert len(traces) == 1


def test_row_functions_are_the_same_when_they_do_the_same():
    def partial(scale):
        return Static(functools.partial(jnp.multiply, scale=scale))

    assert partial(2.0) == partial(2.0) and hash(partial(2.0)) == hash(partial(2.0))
    assert partial(2.0) != partial(3.0) and Static(jnp.sin) != Static(jnp.cos)
    assert Static(jnp.sin) == Static(jnp.sin) and Static(jnp.sin) != jnp.sin


def test_a_chunk_is_as_large_as_documented():
    """Half a GiB of float32 logits for 128k entries."""
    assert DEFAULT_CHUNK_SIZE * 128 * 2**10 * 4 == 2**29


def test_no_gradient_flows_to_rows_and_constants():
    def row_fn(logits, rows, consts):
        return consts * rows * logits.max(-1)

    def of(rows, const):
        return jnp.sum(map_logits(row_fn, HIDDEN, UNEMBED, rows, const, mask=MASK))

    for gradient in jax.grad(of, (0, 1))(jnp.ones((B, T)), 2.0):
        assert not np.any(gradient)


def test_refuses_an_empty_chunk():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        token_logps(HIDDEN, UNEMBED, TARGETS, chunk_size=0)


MASK = RNG.random((B, T)) < 0.4
MASK[2] = False


def masked(hidden, unembed, targets, mask, chunk_size=32):
    how = {"mask": mask, "chunk_size": chunk_size, "return_entropy": True}
    return token_logps(hidden, unembed, targets, **how)


def masked_total(*args, **options):
    return sum(jnp.sum(jnp.sin(x)) for x in masked(*args, **options))


def whole_total(hidden, unembed, targets, mask):
    logits = hidden @ unembed
    both = logps_from_logits(logits, targets), entropy_from_logits(logits)
    return sum(jnp.sum(jnp.where(mask, jnp.sin(x), 0.0)) for x in both)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 1000])
@pytest.mark.parametrize("mask", [MASK, ~MASK, MASK & False, MASK | True])
def test_a_mask_changes_nothing_where_it_is_true(mask, chunk_size):
    args = HIDDEN[:, :9], UNEMBED, TARGETS[:, :9], mask[:, :9]
    function = functools.partial(masked_total, chunk_size=chunk_size)
    got, want = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(*args) for f in (function, whole_total)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, got, want)
    assert not np.any(got[1][0][~mask[:, :9]])
    for x in masked(*args, chunk_size=chunk_size):
        assert not np.any(np.asarray(x)[~mask[:, :9]])


def test_chunks_without_a_counted_position_are_left_out():
    computed = []

    def row_fn(logits, rows, consts):
        jax.debug.callback(lambda x: computed.append(x.size), logits[..., 0])
        return logits.max(-1)

    mask = np.zeros((B, T), bool)
    mask[:, -5:], mask[0, 3:6] = True, True  # 8 positions at most, 4 a chunk
    got = map_logits(row_fn, HIDDEN, UNEMBED, mask=mask, chunk_size=32)
    jax.effects_barrier()
    assert computed == [32, 32]
    want = np.where(mask, (HIDDEN @ UNEMBED).max(-1), 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("split", SPECS)
def test_a_mask_on_eight_devices(split):
    args = HIDDEN, UNEMBED, TARGETS, MASK
    grad, there = (
        jax.jit(jax.value_and_grad(masked_total, (0, 1))),
        spread(split, *args),
    )
    assert_trees_close(grad(*there), grad(*args), n=SUM_LENGTH)
    if split == "batch":
        hlo = compiled(grad, *there)
        assert "all-gather" not in hlo and "all-to-all" not in hlo


def test_a_mask_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    args = HIDDEN, UNEMBED, TARGETS, MASK
    want = jax.grad(masked_total, (0, 1))(*args)
    specs = P("data"), P(None), P("data"), P("data")
    with jax.set_mesh(mesh):
        there = jax.device_put(args, tuple(NamedSharding(mesh, x) for x in specs))
        got = jax.jit(jax.grad(masked_total, (0, 1)))(*there)
    assert_trees_close(got, want, n=SUM_LENGTH)


@pytest.mark.parametrize("mask", [MASK[:, :3], MASK[0], MASK[..., None], 1.0 * MASK])
def test_another_mask_is_refused(mask):
    with pytest.raises(AssertionError):
        masked(HIDDEN, UNEMBED, TARGETS, mask)
