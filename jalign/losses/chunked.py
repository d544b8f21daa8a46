"""Functions of the logits, a chunk of tokens at a time, never [B, T, V]; and the sum of
a loss of them, with its gradient taken in the forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, PyTree
from jalign.losses.chunks import (
    Grid,
    back,
    chunk_grid,
    join_chunks,
    make_front,
    split_chunks,
    to_front,
)
from jalign.losses.linear import with_transpose

DEFAULT_CHUNK_SIZE = 1024
"""Tokens whose float32 logits exist at once: 0.5 GiB for a vocabulary of 128k."""

RowFn = Callable[..., PyTree]


def map_logits(
    row_fn: RowFn,
    hidden: Array,
    unembed: Array,
    rows: PyTree = (),
    consts: PyTree = (),
    *,
    mask: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> PyTree:
    """`row_fn(hidden @ unembed, rows, consts)` without the logits of all tokens.

    The product is taken in hidden's dtype and accumulated in float32. The backward
    pass computes each chunk's logits again, differentiates `row_fn` by itself, and
    accumulates the gradient of `unembed` in float32 over the chunks. A chunk takes
    some positions of every row rather than all of some rows, so that a batch sharded
    over devices keeps them all at work; only if B > chunk_size are rows split too.

    Args:
      row_fn: (logits float32 [R, S, V], rows [R, S, ...], consts) -> tree of [R, S].
        A module-level function or a functools.partial of one with hashable arguments;
        arrays reach it by `rows` and `consts`, not by closure.
      hidden: any float dtype [B, T, D]; its gradient has the same dtype.
      unembed: any float dtype [D, V]; its gradient has the same dtype.
      rows: tree of [B, T, ...] cut like hidden. No gradient flows.
      consts: tree of arrays given whole to each chunk. No gradient flows.
      mask: bool [B, T], True where the result is wanted. Elsewhere it is 0 and has no
        gradient; the logits of prompts and padding are not computed, but for the rest
        of a chunk. None for everywhere.
      chunk_size: tokens per chunk over the whole (global) batch. On a mesh multiply
        by the number of devices over which the batch is split.

    Returns: the tree of [B, T] that row_fn gives.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    """
    check(hidden, unembed, (rows, mask), chunk_size)
    row_fn = Static(row_fn)
    if mask is None:
        return map_chunks(row_fn, chunk_size, hidden, unembed, rows, consts, None)
    front = make_front(mask)
    hidden, rows = to_front((hidden, rows), front)
    out = map_chunks(row_fn, chunk_size, hidden, unembed, rows, consts, front.longest)
    return back(out, front, mask)


def check(hidden, unembed, rows_and_mask, chunk_size: int) -> None:
    chex.assert_rank([hidden, unembed], [3, 2])
    chex.assert_type([hidden, unembed], float)
    chex.assert_equal(hidden.shape[2], unembed.shape[0])
    chex.assert_tree_shape_prefix(rows_and_mask, hidden.shape[:2])
    if rows_and_mask[1] is not None:
        chex.assert_shape(rows_and_mask[1], hidden.shape[:2])
        chex.assert_type(rows_and_mask[1], jnp.bool_)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


class Static:
    """A row function compared by what it does, so that equal partials share a trace."""

    def __init__(self, fn: RowFn):
        self.fn = fn
        self.identity: tuple = (fn,)
        if isinstance(fn, functools.partial):
            self.identity = (fn.func, fn.args, tuple(sorted(fn.keywords.items())))

    def __call__(self, *args):
        return self.fn(*args)

    def __eq__(self, other):
        return isinstance(other, Static) and self.identity == other.identity

    def __hash__(self):
        return hash(self.identity)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def map_chunks(row_fn, chunk_size, hidden, unembed, rows, consts, needed):
    grid = chunk_grid(hidden, chunk_size)
    weights = unembed.astype(hidden.dtype)

    def one_chunk(carry, chunk):
        x, r = chunk
        return carry, row_fn(logits_of(x, weights), r, consts)

    _, out = over_chunks(
        one_chunk, (), split_chunks((hidden, rows), grid), grid, needed
    )
    return join_chunks(out, grid)


@map_chunks.defjvp
def _map_jvp(row_fn, chunk_size, primals, tangents):
    moved, gradients = (
        functools.partial(f, row_fn, chunk_size) for f in (_tangents, _gradients)
    )
    out = map_chunks(row_fn, chunk_size, *primals)
    # No gradient flows to rows, consts and what is needed.
    return out, with_transpose(moved, gradients, primals, tangents[:2])


def _tangents(row_fn, chunk_size, primals, tangents):
    """Of the result, from those of hidden and unembed."""
    hidden, unembed, rows, consts, needed = primals
    grid = chunk_grid(hidden, chunk_size)
    weights, weights_dot = (w.astype(hidden.dtype) for w in (unembed, tangents[1]))

    def one_chunk(carry, chunk):
        x, x_dot, r = chunk
        logits_dot = logits_of(x_dot, weights) + logits_of(x, weights_dot)
        logits = logits_of(x, weights)
        return carry, jax.jvp(lambda z: row_fn(z, r, consts), (logits,), (logits_dot,))[
            1
        ]

    chunks = split_chunks((hidden, tangents[0], rows), grid)
    return join_chunks(over_chunks(one_chunk, (), chunks, grid, needed)[1], grid)


def _gradients(row_fn, chunk_size, primals, cotangents):
    """Of hidden and unembed, from the cotangents of the result."""
    hidden, unembed, rows, consts, needed = primals
    grid = chunk_grid(hidden, chunk_size)
    weights = unembed.astype(hidden.dtype)

    def one_chunk(d_unembed, chunk):
        x, r, g = chunk
        _, vjp = jax.vjp(lambda z: row_fn(z, r, consts), logits_of(x, weights))
        d_hidden, d_weights = gradients(x, weights, vjp(g)[0])
        return d_unembed + d_weights, d_hidden

    zeros = jnp.zeros_like(unembed, jnp.float32)
    chunks = split_chunks((hidden, rows, cotangents), grid)
    d_unembed, d_hidden = over_chunks(one_chunk, zeros, chunks, grid, needed)
    return join_chunks(d_hidden, grid), d_unembed.astype(unembed.dtype)


def over_chunks(body, carry, chunks, grid: Grid, needed):
    """lax.scan, with zeros for chunks all of whose positions are `needed` or later."""
    if needed is None:
        return jax.lax.scan(body, carry, chunks)

    def skip(carry, chunk):
        outs = jax.eval_shape(body, carry, chunk)[1]
        return carry, jax.tree.map(jnp.zeros_like, outs)

    def step(carry, place):
        start, chunk = place
        return jax.lax.cond(start < needed, body, skip, carry, chunk)

    starts = jnp.tile(grid.size * jnp.arange(grid.pieces_t), grid.pieces_b)
    return jax.lax.scan(step, carry, (starts, chunks))


def gradients(x, weights, d_logits):
    """Of hidden, in its dtype, and of the unembedding, float32."""
    d_logits = d_logits.astype(x.dtype)
    d_hidden = _product("bsv,dv->bsd", d_logits, weights).astype(x.dtype)
    # As split as the weights are: on a mesh of explicit axes it has to be said.
    sharding = jax.typeof(weights).sharding
    return d_hidden, _product("bsd,bsv->dv", x, d_logits, out_sharding=sharding)


def _product(spec: str, a: jax.Array, b: jax.Array, **options) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, **options)


def logits_of(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    return _product("bsd,dv->bsv", hidden, weights)


def sum_over_logits(
    row_fn: RowFn,
    hidden: Array,
    unembed: Array,
    rows: PyTree,
    mask: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> tuple[jax.Array, PyTree]:
    """The sum of a loss of the logits, for less than `map_logits` and a sum.

    What the loss is multiplied with is known to be 0 or 1, so each chunk's gradient is
    taken right after its loss, and its logits are computed once, not twice. As with
    `map_logits(mask=...)`, those of prompts and padding are left out.

    Args:
      row_fn: (logits float32 [R, S, V], rows) -> (loss [R, S], tree of [R, S]); as of
        `map_logits`. No gradient flows through the tree.
      hidden, unembed, rows, chunk_size: as of `map_logits`.
      mask: bool [B, T], True where the loss counts.

    Returns: (the sum of the loss where the mask is True, float32 []; the tree [B, T],
      0 where the mask is False).
    Raises: as `map_logits`.
    """
    check(hidden, unembed, (rows, mask), chunk_size)
    row_fn = Static(row_fn)
    front = make_front(mask)
    hidden, rows, fronted_mask = to_front((hidden, rows, mask), front)
    args = row_fn, chunk_size, hidden, unembed, rows, fronted_mask, front.longest
    total, tree = _sum_over_logits(*args)  # pyright: ignore
    return total, back(tree, front, mask)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_over_logits(row_fn, chunk_size, hidden, unembed, rows, mask, needed):
    plain_fn = Static(lambda z, r, _: row_fn(z, r))
    args = (plain_fn, chunk_size, hidden, unembed, rows, (), needed)
    out: Any = map_chunks(*args)
    loss, tree = out
    return jnp.sum(jnp.where(mask, loss, 0.0)), tree


@_sum_over_logits.defjvp
def _sum_jvp(row_fn, chunk_size, primals, tangents):
    out, (d_hidden, d_unembed) = _sum_and_gradients(row_fn, chunk_size, *primals)
    hidden_dot, unembed_dot, *_ = tangents  # no gradient flows to the rest
    # In their own dtypes, for the backward pass keeps the gradients as they are.
    total_dot = jnp.sum(d_hidden * hidden_dot, dtype=jnp.float32)
    total_dot += jnp.sum(d_unembed * unembed_dot, dtype=jnp.float32)
    return out, (total_dot, jax.tree.map(jnp.zeros_like, out[1]))


def _sum_and_gradients(row_fn, chunk_size, hidden, unembed, rows, mask, needed):
    grid = chunk_grid(hidden, chunk_size)
    weights = unembed.astype(hidden.dtype)

    def one_chunk(carry, chunk):
        x, r, counts = chunk
        loss, vjp, tree = jax.vjp(
            lambda z: row_fn(z, r), logits_of(x, weights), has_aux=True
        )
        d_hidden, d_weights = gradients(x, weights, vjp(counts.astype(loss.dtype))[0])
        total = carry[0] + jnp.sum(jnp.where(counts, loss, 0.0))
        return (total, carry[1] + d_weights), (tree, d_hidden)

    zeros = jnp.float32(0.0), jnp.zeros_like(unembed, jnp.float32)
    chunks = split_chunks((hidden, rows, mask), grid)
    (total, d_unembed), outs = over_chunks(one_chunk, zeros, chunks, grid, needed)
    tree, d_hidden = join_chunks(outs, grid)
    return (total, tree), (d_hidden, d_unembed.astype(unembed.dtype))
