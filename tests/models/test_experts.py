"""Tests for jalign/models/experts.py, against float64 loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models import experts
from jalign.models.config import Experts

E, D, F = 5, 6, 8
RNG = np.random.default_rng(0)
X = jnp.float32(RNG.normal(size=(4, 6, D)))
KERNELS = [jnp.float32(RNG.normal(size=s)) for s in ((E, D, F), (E, D, F), (E, F, D))]
ROUTER = RNG.normal(size=(D, E)).astype("f4")


def silu(x):
    return x / (1 + np.exp(-x))


def by_loops(x, ids, weights, gate, up, down):
    """float64, a token and an expert at a time."""
    x, *kernels = (np.asarray(y, np.float64) for y in (x, gate, up, down))
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-1]):
        for e, weight in zip(ids[at], weights[at], strict=True):
            g, u, d = (kernel[e] for kernel in kernels)
            y[at] += weight * ((silu(x[at] @ g) * (x[at] @ u)) @ d)
    return y


@pytest.mark.parametrize("normalize", [False, True])
def test_routes_are_the_largest_of_a_softmax_over_all(normalize):
    ids, weights, whole = experts.route(Experts(E, 2, normalize), X, ROUTER)
    logits = np.asarray(X, np.float64) @ ROUTER
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.argsort(-p, axis=-1)[..., :2]
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(whole, p, rtol=1e-5)
    chosen = np.take_along_axis(p, want, -1)
    chosen = chosen / chosen.sum(-1, keepdims=True) if normalize else chosen
    np.testing.assert_allclose(weights, chosen, rtol=1e-5)
    assert weights.dtype == jnp.float32
    half = experts.route(Experts(E, 2, normalize), jnp.bfloat16(X), ROUTER)[1]
    assert half.dtype == jnp.float32


def test_of_equal_experts_the_first_are_taken():
    ids, weights, _ = experts.route(Experts(E, 3), X, np.zeros((D, E), "f4"))
    np.testing.assert_array_equal(ids, np.broadcast_to([0, 1, 2], (4, 6, 3)))
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


ROWS = X.reshape(-1, D)
WEIGHTS = RNG.uniform(size=(len(ROWS), 2)).astype("f4")
ROUTES = {
    "even": np.stack([np.arange(24) % E, (np.arange(24) + 2) % E], 1),
    "two experts have all": np.broadcast_to([4, 1], (24, 2)),
}


def mixture(x, weights, *kernels, ids):
    return experts.mixture(jax.nn.silu, x, ids, weights, *kernels)


@pytest.mark.parametrize("name", ROUTES)
def test_a_mixture_is_the_sum_over_a_tokens_experts(name):
    ids = ROUTES[name].astype(np.int32)
    want = by_loops(ROWS, ids, WEIGHTS, *KERNELS)
    got = mixture(ROWS, WEIGHTS, *KERNELS, ids=ids)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_its_gradient_is_that_of_all_experts_at_once():
    """Every expert of every token, those that a token has not with weight 0."""
    ids = jnp.int32(ROUTES["even"])

    def at_once(x, weights, gate, up, down):
        dense = (jax.nn.one_hot(ids, E) * weights[..., None]).sum(1)
        wide = jax.nn.silu(jnp.einsum("md,edf->mef", x, gate))
        wide = wide * jnp.einsum("md,edf->mef", x, up)
        return jnp.einsum("mef,efd,me->md", wide, down, dense)

    def grads(function):
        def loss(*args):
            return jnp.sum(jnp.sin(function(*args)))

        return jax.jit(jax.grad(loss, range(5)))(ROWS, WEIGHTS, *KERNELS)

    for got, want in zip(
        grads(functools.partial(mixture, ids=ids)), grads(at_once), strict=True
    ):
        bound = 1e-5 * abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def test_on_a_mesh_each_device_has_its_tokens_and_a_part_of_each_kernel():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    ids, weights, _ = experts.route(Experts(E, 2), X, ROUTER)
    want = by_loops(X, np.asarray(ids), np.asarray(weights), *KERNELS)
    args = jax.nn.silu, X, ids, weights, tuple(KERNELS), jnp.float32
    for where in (None, mesh):
        got = jax.jit(lambda where=where: experts.on_mesh(where, *args))()
        np.testing.assert_allclose(got, want, atol=1e-4)
