"""The product with a kernel and its adapters, x W + s (x A) B, in two orders."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jalign.models.platform import PRODUCT, Platform, kernel_gradient


class Equations(NamedTuple):
    """The einsums of adapters, from their kernel's; of "btd,dnh->btnh" these:

    Attributes:
      low: of x and A, "btd,dr->btr".
      high: of x A and B, "btr,rnh->btnh".
      kernel: of A and B, "dr,rnh->dnh".
      d_x: of the output's gradient and the kernel, "btnh,dnh->btd".
      d_low: of the output's gradient and B, "btnh,rnh->btr".
    """

    low: str
    high: str
    kernel: str
    d_x: str
    d_low: str


def equations(equation: str) -> Equations:
    """Of an equation of x and the kernel."""
    inputs, y = equation.split("->")
    x, kernel = inputs.split(",")
    ins = "".join(axis for axis in kernel if axis in x)
    outs = "".join(axis for axis in kernel if axis not in x)
    low = "".join(axis for axis in x if axis not in ins) + "r"
    return Equations(
        low=f"{x},{ins}r->{low}",
        high=f"{low},r{outs}->{y}",
        kernel=f"{ins}r,r{outs}->{kernel}",
        d_x=f"{y},{kernel}->{x}",
        d_low=f"{y},r{outs}->{low}",
    )


def low_rank(
    platform: Platform, equation: str, x: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    """(x A) B in x's dtype: two small products, and nothing as large as the kernel.

    The backward pass keeps x A, not the result: what it is added to is kept as a sum.

    Args:
      platform: of models.platform, where it runs.
      equation: of x and the kernel, such as "btd,dnh->btnh".
      x: activations.
      a, b: [inputs, r] and [r, outputs], cast to x's dtype.
    """
    eq = equations(equation)
    low = checkpoint_name(platform.einsum(eq.low, x, a.astype(x.dtype)), PRODUCT)
    return platform.einsum(eq.high, low, b.astype(x.dtype))


def pays_to_merge(platform: Platform, x: jax.Array, kernel: Any) -> bool:
    """Whether `merged` is the better order: where the platform says so, but not of a
    quantized kernel, nor below float32, whose few digits would round the adapters away
    beside the kernel, nor for fewer tokens than outputs."""
    if not platform.merge_adapters or isinstance(kernel, Mapping):
        return False
    return x.dtype == kernel.dtype == jnp.float32 and x.size >= kernel.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def merged(
    equation: str,
    x: jax.Array,
    kernel: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    """x (W + s A B): one wide product forward and, of a frozen W, one backward.

    The gradients of A and B do not pass through that of the sum, which would cost as
    much as W's. No forward mode (jax.jvp).

    Args:
      equation: of x and the kernel.
      x, kernel, a, b: of one dtype.
      scale: s, [].
    """
    return jnp.einsum(equation, x, _sum(equation, kernel, a, b, scale))


def _sum(equation, kernel, a, b, scale):
    return kernel + scale * jnp.einsum(equations(equation).kernel, a, b)


def _forward(equation, *args):
    return merged(equation, *args), args


def _backward(equation, saved, d_y):
    x, kernel, a, b, scale = saved
    eq = equations(equation)
    d_x = jnp.einsum(eq.d_x, d_y, _sum(equation, kernel, a, b, scale))
    low, d_low = jnp.einsum(eq.low, x, a), scale * jnp.einsum(eq.d_low, d_y, b)
    d_kernel = kernel_gradient(equation, x, d_y)  # not computed where W is frozen
    d_a = kernel_gradient(eq.low, x, d_low)
    d_b = kernel_gradient(eq.high, low, d_y)
    return d_x, d_kernel, d_a, scale * d_b, jnp.vdot(d_b, b)


merged.defvjp(_forward, _backward)
