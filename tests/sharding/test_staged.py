"""Gradients that are reduced in two steps (staged.py) are those of einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding

SHAPES = {"b": 8, "t": 4, "d": 16, "n": 4, "h": 6}
SIZES = [dict(fsdp=8), dict(context=4, fsdp=2), dict(context=8)]


@pytest.mark.parametrize("equation", ["btd,dnh->btnh", "btnh,nhd->btd"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("rows", [8, 16, 3])
def test_gradients_are_those_of_einsum(equation, sizes, rows):
    mesh = sharding.make_mesh(**sizes)
    size = SHAPES | {"b": rows}
    x_axes, kernel_axes, y_axes = equation.replace("->", ",").split(",")
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        rng.normal(size=[size[axis] for axis in axes]).astype(np.float32)
        for axes in (x_axes, kernel_axes, y_axes)
    )

    def loss(einsum):
        return lambda x, kernel: (einsum(equation, x, kernel) * weights).sum()

    want = jax.grad(loss(jnp.einsum), (0, 1))(x, kernel)
    axes = ["embed" if axis == "d" else None for axis in kernel_axes]
    place = sharding.activation_sharding(mesh, kernel.shape, *axes)
    placed = jax.device_put(kernel, place)
    einsum = sharding.staged(jnp.einsum, mesh, 2)
    assert einsum is not jnp.einsum
    gradients = jax.jit(jax.grad(loss(einsum), (0, 1)))
    got = gradients(x, placed)
    for one, two in zip(want, got, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_one_step_is_left_alone():
    mesh = sharding.make_mesh()
    some = [sharding.make_mesh(fsdp=4, **{axis: 2}) for axis in ("data", "tensor")]
    for one in ((None, 2), (mesh, None), (mesh, 8), (some[0], 2), (some[1], 2)):
        assert sharding.staged(jnp.einsum, *one) is jnp.einsum
