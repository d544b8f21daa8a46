"""A linear function with a transpose of its own, in every mode of differentiation.

jax.custom_vjp has no forward mode, and jax.custom_derivatives.linear_call (as of jax
0.12) neither vmap nor second derivatives, so this is a primitive.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jalign.losses.checks import PyTree


def with_transpose(
    function: Callable[[PyTree, PyTree], PyTree],
    transpose: Callable[[PyTree, PyTree], PyTree],
    saved: PyTree,
    x: PyTree,
) -> PyTree:
    """`function(saved, x)`, with what the backward pass computes said apart.

    Args:
      function: linear in x, differentiable in saved.
      transpose: (saved, cotangents of the result) -> cotangents of x, of x's shapes
        and dtypes; linear in its second argument, differentiable in saved.
      saved: tree of arrays; its own derivatives are those of `function`.
      x: tree of arrays.
    """
    saved_leaves, saved_tree = jax.tree.flatten(saved)
    x_leaves, x_tree = jax.tree.flatten(x)
    num_saved = len(saved_leaves)
    out_tree = jax.tree.structure(jax.eval_shape(function, saved, x))

    def flat(f, in_tree):
        def call(*leaves):
            args = saved_tree.unflatten(leaves[:num_saved]), leaves[num_saved:]
            return jax.tree.leaves(f(args[0], in_tree.unflatten(args[1])))

        return call

    out = _linear.bind(
        *saved_leaves,
        *x_leaves,
        function=flat(function, x_tree),
        transpose=flat(transpose, out_tree),
        num_saved=num_saved,
    )
    return out_tree.unflatten(out)


_linear = Primitive("jalign_linear")
_linear.multiple_results = True


def _run(*args, function, transpose, num_saved):
    del transpose, num_saved
    return function(*args)


def _shapes(*avals, function, **_):
    return jax.make_jaxpr(function)(*avals).out_avals


def _jvp(primals, tangents, *, function, transpose, num_saved):
    how = {"function": function, "transpose": transpose, "num_saved": num_saved}
    saved, x = primals[:num_saved], primals[num_saved:]
    out = _linear.bind(*primals, **how)
    moved = [ad.Zero(jax.typeof(y).to_tangent_aval()) for y in out]
    if any(type(t) is not ad.Zero for t in tangents[num_saved:]):
        x_dot = map(ad.instantiate_zeros, tangents[num_saved:])
        moved = _linear.bind(*saved, *x_dot, **how)
    moving = [i for i, t in enumerate(tangents[:num_saved]) if type(t) is not ad.Zero]
    if moving:

        def of(*values):
            args = dict(enumerate(saved)) | dict(zip(moving, values, strict=True))
            return function(*args.values(), *x)

        at, along = ([part[i] for i in moving] for part in (saved, tangents))
        moved = map(ad.add_tangents, moved, jax.jvp(of, at, along)[1])
    return out, list(moved)


def _transpose(cotangents, *args, function, transpose, num_saved):
    d_x = _linear.bind(
        *args[:num_saved],
        *map(ad.instantiate_zeros, cotangents),
        function=transpose,
        transpose=function,
        num_saved=num_saved,
    )
    wanted = map(ad.is_undefined_primal, args[num_saved:])
    d_x = [d if want else None for d, want in zip(d_x, wanted, strict=True)]
    return [None] * num_saved + d_x


def _batch(args: Sequence, dims: Sequence, *, function, transpose, num_saved):
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    # All of x in the batch, so that the transpose has one cotangent a member; the
    # transpose of this broadcast adds them up.
    x = [
        jnp.moveaxis(a, d, 0)
        if d is not None
        else jnp.broadcast_to(a, (size, *a.shape))
        for a, d in zip(args[num_saved:], dims[num_saved:], strict=True)
    ]
    axes = tuple(dims[:num_saved])

    def over_batch(f):
        def call(*leaves):
            return jax.vmap(f, (*axes, *[0] * (len(leaves) - num_saved)))(*leaves)

        return call

    out = _linear.bind(
        *args[:num_saved],
        *x,
        function=over_batch(function),
        transpose=over_batch(transpose),
        num_saved=num_saved,
    )
    return out, [0] * len(out)


_linear.def_impl(_run)
_linear.def_abstract_eval(_shapes)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batch
mlir.register_lowering(_linear, mlir.lower_fun(_run, multiple_results=True))
