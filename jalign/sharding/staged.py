"""Products whose kernels' gradients are reduced over fsdp in two steps.

A gradient is a sum over all rows of which a device keeps its part: a reduce-scatter.
libtpu makes one of it up to 32 members, seen on slices of v5e and v5p; for more it adds
up all of the gradient on every device and drops the rest, twice the bytes. In two
steps, over part of the members each, it stays a reduce-scatter.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EMBED = "d"  # in all equations of jalign
_ANY = PartitionSpec.UNCONSTRAINED


def staged(
    einsum: Callable[..., Any], mesh: Mesh | None, most: int | None
) -> Callable[..., Any]:
    """`einsum` of (equation, x [B, ...], kernel), whose gradients are the same.

    Args:
      einsum: as jnp.einsum.
      mesh: of the arrays. Of the kernel, the axis called d is cut over fsdp. Where
        time is cut, too (context), einsum is given back.
      most: members over which one step is enough; None: any number.

    Returns: einsum itself where one step is enough. Else it has no forward mode.
    """
    if mesh is None or most is None or mesh.shape["fsdp"] <= most:
        return einsum
    if mesh.shape["context"] > 1:
        return einsum
    return _staged(einsum, mesh)


@functools.lru_cache(maxsize=16)
def _staged(einsum: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    inner = max(k for k in range(1, fsdp + 1) if fsdp % k == 0 and k * k <= fsdp)
    shape, names = (data, fsdp // inner, inner, tensor), ("data", "outer", "inner")
    types = (mesh.axis_types[0],) * len(shape)
    cut = Mesh(mesh.devices.reshape(shape), (*names, "tensor"), axis_types=types)

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        spec = PartitionSpec(*axes, *(_ANY,) * (x.ndim - len(axes)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(cut, spec))

    def rows(x: jax.Array) -> jax.Array:
        return place(x.reshape(*shape[:3], -1, *x.shape[1:]), *names, None)

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
        if x.shape[0] % (data * fsdp) or kernel.shape[at] % fsdp:
            return d_x, einsum(f"{x_axes},{y_axes}->{kernel_axes}", x, d_y)
        free = (_ANY,) * at
        sums = f"XYZ{x_axes},XYZ{y_axes}->Z{kernel_axes}"
        parts = place(einsum(sums, rows(x), rows(d_y)), "inner", *free, "outer")
        return d_x, place(parts.sum(0), *free, ("outer", "inner"))

    product.defvjp(forward, backward)
    return product
