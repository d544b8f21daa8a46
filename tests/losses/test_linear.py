"""Tests for jalign/losses/linear.py: one function, every mode of differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.losses import logps_from_logits, token_logps
from jalign.losses.chunked import sum_over_logits
from jalign.losses.linear import with_transpose

RNG = np.random.default_rng(0)
B, T, D, V = 2, 5, 4, 7


def normal(*shape):
    return np.asarray(RNG.normal(size=shape), np.float32)


ARGS, ALONG = ((normal(B, T, D), normal(D, V)) for _ in range(2))
TARGETS, MASK = RNG.integers(0, V, (B, T), np.int32), RNG.random((B, T)) < 0.7


def row_loss(logits, targets):
    return logps_from_logits(logits, targets), ()


def chunked(hidden, unembed):
    logps = token_logps(hidden, unembed, TARGETS, mask=MASK, chunk_size=4)
    return jnp.sum(jnp.sin(logps))


def chunked_dense(hidden, unembed):
    logps = logps_from_logits(hidden @ unembed, TARGETS)
    return jnp.sum(jnp.where(MASK, jnp.sin(logps), 0.0))


def summed(hidden, unembed):
    args = row_loss, hidden, unembed, TARGETS, MASK
    return jnp.sin(sum_over_logits(*args, chunk_size=4)[0])


def summed_dense(hidden, unembed):
    logps = logps_from_logits(hidden @ unembed, TARGETS)
    return jnp.sin(jnp.sum(jnp.where(MASK, logps, 0.0)))


def every_mode(f, args, along):
    """All that is asked of a derivative; f takes two arrays."""
    both, last = (0, 1), functools.partial(f, args[0])
    grad = jax.grad(f, both)
    batch = jnp.stack([args[0], 2 * args[0]])
    return {
        "value": f(*args),
        "reverse": grad(*args),
        "forward": jax.jvp(f, args, along),
        "one argument": jax.jvp(last, args[1:], along[1:]),
        "linearize": jax.linearize(f, *args)[1](*along),
        "jacfwd": jax.jacfwd(last)(args[1]),
        "forward over reverse": jax.jvp(grad, args, along)[1],
        "reverse over forward": jax.grad(lambda *a: jax.jvp(f, a, along)[1], both)(
            *args
        ),
        "reverse over reverse": jax.grad(
            lambda *a: sum(map(jnp.vdot, grad(*a), along)), both
        )(*args),
        "forward over forward": jax.jvp(
            lambda *a: jax.jvp(f, a, along)[1], args, along
        )[1],
        "vmap of reverse": jax.vmap(grad, (0, None))(batch, args[1]),
        "reverse of vmap": jax.grad(
            lambda w: jnp.sum(jax.vmap(f, (0, None))(batch, w))
        )(args[1]),
        "checkpoint": jax.grad(jax.checkpoint(f), both)(*args),
    }


@pytest.mark.parametrize(
    ("f", "dense"), [(chunked, chunked_dense), (summed, summed_dense)]
)
def test_every_mode_gives_what_dense_logits_give(f, dense):
    # Little is computed and much compiled.
    options = {"xla_backend_optimization_level": 0}
    got, want = (
        jax.jit(functools.partial(every_mode, g), compiler_options=options)(ARGS, ALONG)
        for g in (f, dense)
    )
    for name, value in want.items():
        check = functools.partial(
            np.testing.assert_allclose, rtol=1e-4, atol=1e-4, err_msg=name
        )
        jax.tree.map(check, got[name], value)


def test_the_transpose_is_the_one_given_and_its_own_inverse():
    def triple(x):
        return with_transpose(lambda s, x: s * x, lambda s, y: s * y + 100.0, 3.0, x)

    def backwards(y):
        return jax.linear_transpose(triple, 1.0)(y)[0]

    assert triple(2.0) == 6.0 and jax.jvp(triple, (2.0,), (5.0,)) == (6.0, 15.0)
    assert backwards(2.0) == 106.0
    assert jax.linear_transpose(backwards, 1.0)(2.0)[0] == 6.0


def test_bfloat16_hidden_states_keep_a_float32_gradient_of_the_unembedding():
    hidden = jnp.bfloat16(ARGS[0])
    moved = jax.jvp(chunked, (hidden, ARGS[1]), (jnp.bfloat16(ALONG[0]), ALONG[1]))[1]
    grads = jax.grad(chunked, (0, 1))(hidden, ARGS[1])
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    want = sum(np.vdot(np.float32(g), v) for g, v in zip(grads, ALONG, strict=True))
    np.testing.assert_allclose(moved, want, rtol=0.03)


def test_a_part_of_the_inputs_may_move_alone():
    def f(a, b):
        apart = lambda s, x: s * (x[0] + 2 * x[1])  # noqa: E731
        back = lambda s, y: (s * y, 2 * s * y)  # noqa: E731
        return with_transpose(apart, back, 3.0, (a, b))

    assert jax.jvp(lambda a: f(a, 5.0), (1.0,), (1.0,)) == (33.0, 3.0)
    assert jax.jvp(lambda b: f(1.0, b), (5.0,), (1.0,)) == (33.0, 6.0)
    assert jax.grad(f, 1)(1.0, 5.0) == 6.0
