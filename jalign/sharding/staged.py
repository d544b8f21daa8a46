"""Products whose kernels' gradients are reduced in two steps.

A gradient is a sum over all tokens of which a device keeps its part: a reduce-scatter
over fsdp x context.
libtpu makes one of it up to 32 members, seen on slices of v5e and v5p; for more it adds
up all of the gradient on every device and drops the rest, twice the bytes. In two
steps, over part of the members each, it stays a reduce-scatter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EMBED = "d"  # in all equations of jalign
_ANY = PartitionSpec.UNCONSTRAINED


def staged(
    einsum: Callable[..., Any], mesh: Mesh | None, most: int | None
) -> Callable[..., Any]:
    """`einsum` of (equation, x [B, T, ...], kernel), whose gradients are the same.

    Args:
      einsum: as jnp.einsum.
      mesh: of the arrays. Of the kernel, the axis called d is cut over fsdp and
        context, of x rows over data and fsdp and time over context.
      most: members over which one step is enough; None: any number.

    Returns: einsum itself where one step is enough. Else it has no forward mode.
    """
    if mesh is None or most is None:
        return einsum
    one_step = mesh.shape["fsdp"] * mesh.shape["context"] <= most
    return einsum if one_step else _staged(einsum, mesh)


def _near_root(number: int) -> int:
    """Its largest divisor that is no larger than its root."""
    return max(k for k in range(1, number + 1) if number % k == 0 and k * k <= number)


@functools.lru_cache(maxsize=16)
def _staged(einsum: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    data, fsdp, context, tensor = mesh.devices.shape
    members = fsdp * context
    inner = context if min(fsdp, context) > 1 else _near_root(members)
    shape, names = (data, members // inner, inner, tensor), ("data", "outer", "inner")
    types = (mesh.axis_types[0],) * len(shape)
    cut = Mesh(mesh.devices.reshape(shape), (*names, "tensor"), axis_types=types)

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        spec = PartitionSpec(*axes, *(_ANY,) * (x.ndim - len(axes)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(cut, spec))

    def by_device(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [data, outer, inner, b, t, ...], as devices have them."""
        sides = data, fsdp, x.shape[0] // (data * fsdp), context, x.shape[1] // context
        x = jnp.moveaxis(x.reshape(*sides, *x.shape[2:]), 3, 2)
        return place(x.reshape(*shape[:3], *sides[2::2], *x.shape[5:]), *names, None)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def product(equation, x, kernel):
        return einsum(equation, x, kernel)

    def forward(equation, x, kernel):
        return einsum(equation, x, kernel), (x, kernel)

    def backward(equation, saved, d_y):
        x, kernel = saved
        operands, y_axes = equation.split("->")
        x_axes, kernel_axes = operands.split(",")
        d_x = einsum(f"{y_axes},{kernel_axes}->{x_axes}", d_y, kernel)
        at = kernel_axes.index(EMBED)
        uneven = x.shape[0] % (data * fsdp) or x.shape[1] % context
        if uneven or kernel.shape[at] % members:
            return d_x, einsum(f"{x_axes},{y_axes}->{kernel_axes}", x, d_y)
        free = (_ANY,) * at
        sums = f"XYZ{x_axes},XYZ{y_axes}->Z{kernel_axes}"
        parts = place(
            einsum(sums, by_device(x), by_device(d_y)), "inner", *free, "outer"
        )
        return d_x, place(parts.sum(0), *free, ("outer", "inner"))

    product.defvjp(forward, backward)
    return product
