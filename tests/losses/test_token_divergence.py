"""Tests for jalign/losses/distillation.py: two models, never [B, T, V]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jalign import losses
from tests.losses.oracle import assert_matches
from tests.losses.test_chunked import compiled, largest_buffer
from tests.losses.test_distillation import jsd, kl, oracle

B, T, D, E, V = 8, 32, 8, 12, 512  # the teacher is wider than the student
RNG = np.random.default_rng(0)
HIDDEN, REF_HIDDEN = (RNG.normal(size=(B, T, n)).astype(np.float32) for n in (D, E))
UNEMBED, REF_UNEMBED = (RNG.normal(size=(n, V)).astype(np.float32) for n in (D, E))
ARGS = HIDDEN, UNEMBED, REF_HIDDEN, REF_UNEMBED
FUNCTIONS = [losses.token_kl, losses.token_forward_kl, losses.token_jsd]


def total(function, *args, chunk_size=32):
    return jnp.sum(jnp.sin(function(*args, chunk_size=chunk_size)))


@pytest.mark.parametrize(
    ("function", "options", "formula"),
    [
        (losses.token_kl, {}, kl),
        (losses.token_forward_kl, {}, lambda p, q: kl(q, p)),
        (losses.token_jsd, {"beta": 0.2}, lambda p, q: jsd(p, q, 0.2)),
    ],
)
def test_matches_float64_closed_form(function, options, formula):
    arrays = [0.7 * x[:2, :3] if x.ndim == 3 else x[:, :6] for x in ARGS]

    def of_heads(hidden, unembed, ref_hidden, ref_unembed):
        logits = 2.0 * np.tanh(hidden @ unembed / 2.0)
        ref_logits = 3.0 * np.tanh(ref_hidden @ ref_unembed / 3.0)
        return oracle(formula, 0.8)(logits, ref_logits)

    options = {"temperature": 0.8, "softcap": 2.0, "ref_softcap": 3.0, **options}
    assert_matches(
        lambda *x: function(*x, chunk_size=4, **options), of_heads, arrays, (0, 1)
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_compiled_buffer_is_as_large_as_all_logits(function):
    grad = jax.value_and_grad(functools.partial(total, function), (0, 1))
    assert largest_buffer(compiled(grad, *ARGS)) <= 2 * 32 * V
    whole = functools.partial(total, function, chunk_size=B * T)
    assert largest_buffer(compiled(whole, *ARGS)) >= B * T * V


@pytest.mark.parametrize("split", ["batch", "vocabulary"])
def test_eight_devices_give_the_same_and_collect_no_logits(split):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = [P("data"), P()] * 2 if split == "batch" else [P(), P(None, "data")] * 2
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    grad = jax.value_and_grad(functools.partial(total, losses.token_jsd), (0, 1))
    args = jax.device_put(ARGS, shardings)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, jax.jit(grad)(*args), jax.jit(grad)(*ARGS))
    if split == "vocabulary":
        assert "all-gather" not in compiled(
            functools.partial(total, losses.token_jsd), *args
        )


def test_bfloat16_heads_are_accumulated_in_float32():
    args = [jnp.asarray(x, jnp.bfloat16) for x in ARGS]
    got = losses.token_kl(*args)
    want = losses.token_kl(*[x.astype(jnp.float32) for x in args])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_refuses_another_vocabulary():
    with pytest.raises(AssertionError):
        losses.token_kl(HIDDEN, UNEMBED, REF_HIDDEN, REF_UNEMBED[:, :-1])


def test_defaults_are_temperature_1_and_beta_a_half():
    args = HIDDEN[:1, :2], UNEMBED, REF_HIDDEN[:1, :2], REF_UNEMBED
    for function in FUNCTIONS:
        options = {"beta": 0.5} if function is losses.token_jsd else {}
        want = function(*args, temperature=1.0, **options)
        np.testing.assert_array_equal(function(*args), want)
