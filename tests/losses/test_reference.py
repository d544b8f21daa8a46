"""Tests for jalign/losses/dpo.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign.losses import moving_reference

RNG = np.random.default_rng(0)
REF, NEW = (
    {"w": RNG.normal(size=(2, 3)).astype("f4"), "b": [RNG.normal(size=3).astype("f4")]}
    for _ in range(2)
)


def test_it_is_the_weighted_mean_of_every_leaf():
    for options, a in (({}, 0.6), ({"alpha": 0.25}, 0.25)):
        got = moving_reference(REF, NEW, **options)
        want = jax.tree.map(lambda r, n, a=a: a * n + (1 - a) * r, REF, NEW)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6), got, want
        )


def test_0_and_1_are_the_reference_and_the_policy_exactly():
    for alpha, want in ((0.0, REF), (1.0, NEW)):
        got = jax.jit(moving_reference)(REF, NEW, alpha=alpha)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_reference_keeps_its_dtype():
    ref = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), REF)
    got = moving_reference(ref, NEW, alpha=1.0)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(got["w"], NEW["w"].astype(jnp.bfloat16))


@pytest.mark.parametrize("bad", [{"w": NEW["w"]}, {"w": NEW["w"], "b": [np.ones(2)]}])
def test_refuses_other_trees(bad):
    with pytest.raises(AssertionError):
        moving_reference(REF, bad)
