"""What every unreduced loss has in common: its checks, and NaN kept where it is."""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias

import chex
import jax
import jax.numpy as jnp

P = ParamSpec("P")

# NumPy arrays are welcome too; a union with them has no arithmetic for pyright.
Array: TypeAlias = jax.Array | Any
Scalar: TypeAlias = float | jax.Array
PyTree: TypeAlias = Any


def check_float32(arrays: Sequence[Array], *, rank: int) -> None:
    """Raises AssertionError at trace time unless all are float32 of one shape.

    Exactly float32: sums of log-probabilities that passed through bfloat16 are wrong
    by tens of nats, and exactly one shape: [B, 1] against [B] would broadcast.
    """
    chex.assert_rank(arrays, rank)
    chex.assert_equal_shape(arrays)
    chex.assert_type(arrays, jnp.float32)


def check_mask(mask: Array, x: Array) -> None:
    """Raises AssertionError at trace time unless mask is bool with the shape of x."""
    chex.assert_equal_shape([mask, x])
    chex.assert_type(mask, jnp.bool_)


def elementwise(
    *, rank: int, bools: Sequence[str] = ()
) -> Callable[[Callable[P, jax.Array]], Callable[P, jax.Array]]:
    """Decorates a loss that maps equal float32 arrays to one array, entry by entry.

    The function's positional parameters are its arrays, the keyword-only ones its
    scalars. An entry with a NaN in any array comes out NaN but has gradient 0: a
    caller who masks it away is not poisoned by 0 * NaN, one who does not sees it.
    A None goes through as it is, to the functions that know what it means.

    Args:
      rank: of every array; 1 for [B], 2 for [B, T].
      bools: names of the positional parameters that are bool rather than float32.

    Returns: a decorator; the decorated function raises AssertionError at trace time
      unless all its arrays are float32 (or bool), of this rank and of one shape.
    """

    def decorate(function: Callable[P, jax.Array]) -> Callable[P, jax.Array]:
        signature = inspect.signature(function)
        is_bool = [name in bools for name in signature.parameters]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> jax.Array:
            bound = signature.bind(*args, **kwargs)
            kinds = list(zip(bound.args, is_bool, strict=False))
            floats = [x for x, b in kinds if not b and x is not None]
            check_float32(floats, rank=rank)
            for x in [x for x, b in kinds if b]:
                check_mask(x, floats[0])
            # Cleaned before the formula: `where` after it would still give 0 * NaN.
            bad = functools.reduce(operator.or_, map(jnp.isnan, floats))
            clean = [x if b or x is None else jnp.where(bad, 0.0, x) for x, b in kinds]
            out = function(*clean, **bound.kwargs)  # pyright: ignore[reportCallIssue]
            return jnp.where(bad, jnp.nan, out)

        return checked

    return decorate
