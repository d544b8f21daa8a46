"""Quantized kernels in a model: the product that reads codes, and trees with them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jalign import sharding
from jalign.models import tensors
from jalign.models.platform import Platform
from jalign.models.quantize import Leaves, dequantize, quantize
from jalign.sharding.rules import part_axes

Params = dict[str, Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def product(
    platform: Platform,
    mesh: Mesh | None,
    equation: str,
    shape: tuple[int, ...],
    x: jax.Array,
    leaves: Leaves,
) -> jax.Array:
    """einsum(equation, x, kernel) of a quantized kernel, in x's dtype.

    The backward pass keeps codes, not the kernel, and gives the gradient of x only; on
    a mesh codes are what is gathered. No forward mode (jax.jvp).

    Args:
      platform: of models.platform, where it runs.
      mesh: of sharding.make_mesh, or None.
      equation: of x and the kernel, such as "btd,dnh->btnh".
      shape: the kernel's.
      x: activations.
      leaves: of `quantize`.
    """
    return _forward(platform, mesh, equation, shape, x, leaves)[0]


def _forward(platform, mesh, equation, shape, x, leaves):
    whole = _gathered(equation, mesh, leaves)
    kernel = dequantize(whole, shape, x.dtype, keep=platform.keep)
    return platform.einsum(equation, x, kernel), leaves


def _backward(platform, mesh, equation, shape, leaves, d_y):
    inputs, y_axes = equation.split("->")
    x_axes, kernel_axes = inputs.split(",")
    # Else layers that are not scanned would share one kernel with the forward pass.
    leaves, d_y = jax.lax.optimization_barrier((leaves, d_y))
    whole = _gathered(equation, mesh, leaves)
    kernel = dequantize(whole, shape, d_y.dtype, keep=platform.keep)
    return platform.einsum(f"{y_axes},{kernel_axes}->{x_axes}", d_y, kernel), None


product.defvjp(_forward, _backward)

# The axes of a kernel that stay cut where it is used, by their letters in equations.
_CUT = {"n": "act_heads", "f": "act_mlp"}


def _gathered(equation: str, mesh: Mesh | None, leaves: Leaves) -> Leaves:
    """The leaves as the product wants them: whole but for heads and the MLP's width."""
    x_axes, kernel_axes = equation.partition("->")[0].split(",")
    inputs = [_CUT.get(axis) for axis in kernel_axes if axis in x_axes]
    outputs = [_CUT.get(axis) for axis in kernel_axes if axis not in x_axes]
    return {
        name: sharding.constrain(x, mesh, *part_axes("kernel/" + name, inputs, outputs))
        for name, x in leaves.items()
    }


def is_quantized(params: Params) -> bool:
    """Whether there is a quantized kernel among the parameters."""
    return any(
        path.endswith(("/nf4", "/int8")) for path in flatten_dict(params, sep="/")
    )


def quantize_params(params: Params, method: str, *, double: bool = True) -> Params:
    """The kernels of all layers quantized, as `models.load` does while it reads.

    Embedding, norms, biases and heads stay. A layer at a time; under jax.eval_shape it
    tells the shapes.

    Args:
      params: of `Model.init` or `models.load`.
      method, double: see `quantize`.
    """
    flat = flatten_dict(params, sep="/")
    for path in filter(tensors.is_linear, list(flat)):
        how = dict(method=method, num_inputs=tensors.inputs_of(path), double=double)
        leaves = jax.lax.map(functools.partial(quantize, **how), flat.pop(path))
        flat |= {f"{path}/{name}": leaf for name, leaf in leaves.items()}
    return unflatten_dict(flat, sep="/")


def dequantize_params(
    params: Params, shapes: Params, dtype: DTypeLike = jnp.float32
) -> Params:
    """The parameters with kernels of floats again; for comparisons, since it is large.

    Args:
      params: with quantized kernels, or without.
      shapes: of `Model.param_shapes`.
      dtype: of the kernels that were quantized.
    """

    def whole(like, value):
        if not isinstance(value, Mapping):
            return value
        one = functools.partial(dequantize, shape=like.shape[1:], dtype=dtype)
        return jax.lax.map(one, value)

    return jax.tree.map(whole, shapes, params)
