"""Products whose kernels are gathered, and their gradients reduced, in two steps.

A gradient is a sum over all tokens of which a device keeps its part: a reduce-scatter
over fsdp x context. libtpu makes one of it over up to 32 devices, and over more if they
are not all that there are, seen on slices of v5e and v5p; over all of more than 32 it
adds up the whole gradient on every device and drops the rest, twice the bytes, and if
time is cut gathers the kernels so, too. In two steps it does neither.
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
    """`einsum` of (equation, x [B, T, ...], kernel), whose gradients are the same.

    Args:
      einsum: as jnp.einsum.
      mesh: of the arrays. Of the kernel, the axis called d is cut over fsdp and
        context, of x rows over fsdp and time over context.
      most: devices over which one step is enough; None: any number.

    Returns: einsum itself where one step is enough. Else it has no forward mode.
    """
    if mesh is None or most is None or mesh.size <= most:
        return einsum
    whole = mesh.shape["fsdp"] * mesh.shape["context"] == mesh.size
    return _staged(einsum, mesh) if whole else einsum


def _near_root(number: int) -> int:
    """Its largest divisor that is no larger than its root."""
    return max(k for k in range(1, number + 1) if number % k == 0 and k * k <= number)


@functools.lru_cache(maxsize=16)
def _staged(einsum: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    fsdp, context, members = mesh.shape["fsdp"], mesh.shape["context"], mesh.size
    inner = context if min(fsdp, context) > 1 else _near_root(members)
    shape, types = (members // inner, inner), (mesh.axis_types[0],) * 2
    cut = Mesh(mesh.devices.reshape(shape), ("outer", "inner"), axis_types=types)

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        spec = PartitionSpec(*axes, *(_ANY,) * (x.ndim - len(axes)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(cut, spec))

    def by_device(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [outer, inner, b, t, ...], as devices have them."""
        b, t, rest = x.shape[0] // fsdp, x.shape[1] // context, x.shape[2:]
        x = x.reshape(fsdp, b, context, t, *rest).swapaxes(1, 2)
        return place(x.reshape(*shape, b, t, *rest), "outer", "inner", None)

    def at(equation: str) -> tuple[Any, ...]:
        """A spec of the kernel's axes before d."""
        return (_ANY,) * equation.split("->")[0].split(",")[1].index(EMBED)

    def gathered(equation, kernel):
        return place(kernel, *at(equation), "outer") if context > 1 else kernel

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def product(equation, x, kernel):
        return einsum(equation, x, gathered(equation, kernel))

    def forward(equation, x, kernel):
        return product(equation, x, kernel), (x, kernel)

    def backward(equation, saved, d_y):
        x, kernel = saved
        operands, y_axes = equation.split("->")
        x_axes, kernel_axes = operands.split(",")
        kernel_now, free = gathered(equation, kernel), at(equation)
        d_x = einsum(f"{y_axes},{kernel_axes}->{x_axes}", d_y, kernel_now)
        uneven = x.shape[0] % fsdp or x.shape[1] % context
        if uneven or kernel.shape[len(free)] % members:
            return d_x, einsum(f"{x_axes},{y_axes}->{kernel_axes}", x, d_y)
        sums = f"YZ{x_axes},YZ{y_axes}->Z{kernel_axes}"
        parts = einsum(sums, by_device(x), by_device(d_y))
        parts = place(parts, "inner", *free, "outer")
        return d_x, place(parts.sum(0), *free, ("outer", "inner"))

    product.defvjp(forward, backward)
    return product
