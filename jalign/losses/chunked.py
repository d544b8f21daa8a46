"""Functions of the logits, a chunk of tokens at a time, never [B, T, V]; and the sum of
a loss of them, with its gradient taken in the forward pass.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, PyTree
from jalign.losses.chunks import (
    back,
    chunk_grid,
    join_chunks,
    make_front,
    split_chunks,
    to_front,
)
from jalign.losses.layout import ONE_DEVICE, Layout
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
    layout: Layout = ONE_DEVICE,
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
      layout: how the logits lie on a mesh, as of sharding.groups.logits_groups: the
        unembedding is gathered once and its gradient reduced once. By default the
        compiler decides, which does both anew for each chunk.

    Returns: the tree of [B, T] that row_fn gives.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    """
    check(hidden, unembed, (rows, mask), chunk_size)
    static = Static(row_fn), How(chunk_size, layout)
    if mask is None:
        return map_chunks(*static, hidden, unembed, rows, consts, None)
    front = make_front(mask)
    hidden, rows = to_front((hidden, rows), front)
    out = map_chunks(*static, hidden, unembed, rows, consts, front.longest)
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


class How(NamedTuple):
    """Tokens of a chunk, over all groups of the layout; and the layout."""

    chunk_size: int
    layout: Layout

    def logits(self, x: jax.Array, weights: jax.Array) -> jax.Array:
        """Of a chunk, float32 [R, S, V]."""
        logits = _product("bsd,dv->bsv", x, weights)
        return self.layout.place(logits, None, None, "vocab")

    def zeros(self, weights: jax.Array) -> jax.Array:
        """For the gradient of the unembedding to add up in."""
        return self.layout.place(jnp.zeros_like(weights, jnp.float32), None, "vocab")

    def over_chunks(self, body, carry, by_rows, needed):
        """lax.scan of body over the chunks of a group's rows: (its outputs, the carry).

        Zeros for chunks all of whose positions are `needed` or later; None for none.
        """
        place, size = self.layout.place, max(1, self.chunk_size // self.layout.groups)
        grid = chunk_grid(jax.tree.leaves(by_rows)[0], size)

        def placed(carry, chunk):
            carry, outs = body(carry, jax.tree.map(place, chunk))
            return carry, jax.tree.map(lambda y: place(y, "row"), outs)

        def skip(carry, chunk):
            outs = jax.eval_shape(body, carry, chunk)[1]
            return carry, jax.tree.map(jnp.zeros_like, outs)

        def step(carry, where):
            start, chunk = where
            return jax.lax.cond(start < needed, placed, skip, carry, chunk)

        chunks = split_chunks(by_rows, grid)
        starts = jnp.tile(grid.size * jnp.arange(grid.pieces_t), grid.pieces_b)
        each = (placed, chunks) if needed is None else (step, (starts, chunks))
        carry, outs = jax.lax.scan(each[0], carry, each[1])
        return join_chunks(outs, grid), carry


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def map_chunks(row_fn, how: How, hidden, unembed, rows, consts, needed):
    def local(by_rows, weights):
        def one_chunk(carry, chunk):
            x, r = chunk
            return carry, row_fn(how.logits(x, weights), r, consts)

        return how.over_chunks(one_chunk, (), by_rows, needed)

    weights = unembed.astype(hidden.dtype)
    return how.layout.run(local, (hidden, rows), weights)[0]


@map_chunks.defjvp
def _map_jvp(row_fn, how, primals, tangents):
    moved, gradients = (
        functools.partial(f, row_fn, how) for f in (_tangents, _gradients)
    )
    out = map_chunks(row_fn, how, *primals)
    # No gradient flows to rows, consts and what is needed.
    return out, with_transpose(moved, gradients, primals, tangents[:2])


def _tangents(row_fn, how, primals, tangents):
    """Of the result, from those of hidden and unembed."""
    hidden, unembed, rows, consts, needed = primals

    def local(by_rows, weights):
        weights, weights_dot = weights

        def one_chunk(carry, chunk):
            x, x_dot, r = chunk
            logits_dot = how.logits(x_dot, weights) + how.logits(x, weights_dot)
            logits = how.logits(x, weights)
            row = jax.jvp(lambda z: row_fn(z, r, consts), (logits,), (logits_dot,))
            return carry, row[1]

        return how.over_chunks(one_chunk, (), by_rows, needed)

    both = tuple(w.astype(hidden.dtype) for w in (unembed, tangents[1]))
    return how.layout.run(local, (hidden, tangents[0], rows), both)[0]


def _gradients(row_fn, how, primals, cotangents):
    """Of hidden and unembed, from the cotangents of the result."""
    hidden, unembed, rows, consts, needed = primals

    def local(by_rows, weights):
        def one_chunk(d_unembed, chunk):
            x, r, g = chunk
            _, vjp = jax.vjp(lambda z: row_fn(z, r, consts), how.logits(x, weights))
            d_hidden, d_weights = gradients(x, weights, vjp(g)[0])
            return d_unembed + d_weights, d_hidden

        return how.over_chunks(one_chunk, how.zeros(weights), by_rows, needed)

    by_rows, weights = (hidden, rows, cotangents), unembed.astype(hidden.dtype)
    d_hidden, d_unembed = how.layout.run(local, by_rows, weights)
    return d_hidden, d_unembed.astype(unembed.dtype)


def gradients(x, weights, d_logits):
    """Of hidden, in its dtype, and of the unembedding, float32."""
    d_logits = d_logits.astype(x.dtype)
    d_hidden = _product("bsv,dv->bsd", d_logits, weights).astype(x.dtype)
    # As split as the weights are: on a mesh of explicit axes it has to be said.
    sharding = jax.typeof(weights).sharding
    return d_hidden, _product("bsd,bsv->dv", x, d_logits, out_sharding=sharding)


def _product(spec: str, a: jax.Array, b: jax.Array, **options) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, **options)


def sum_over_logits(
    row_fn: RowFn,
    hidden: Array,
    unembed: Array,
    rows: PyTree,
    mask: Array,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    layout: Layout = ONE_DEVICE,
) -> tuple[jax.Array, PyTree]:
    """The sum of a loss of the logits, for less than `map_logits` and a sum.

    What the loss is multiplied with is known to be 0 or 1, so each chunk's gradient is
    taken right after its loss, and its logits are computed once, not twice. As with
    `map_logits(mask=...)`, those of prompts and padding are left out.

    Args:
      row_fn: (logits float32 [R, S, V], rows) -> (loss [R, S], tree of [R, S]); as of
        `map_logits`. No gradient flows through the tree.
      hidden, unembed, rows, chunk_size, layout: as of `map_logits`.
      mask: bool [B, T], True where the loss counts.

    Returns: (the sum of the loss where the mask is True, float32 []; the tree [B, T],
      0 where the mask is False).
    Raises: as `map_logits`.
    """
    check(hidden, unembed, (rows, mask), chunk_size)
    front = make_front(mask)
    hidden, rows, fronted_mask = to_front((hidden, rows, mask), front)
    static = Static(row_fn), How(chunk_size, layout)
    args = hidden, unembed, rows, fronted_mask, front.longest
    total, tree = _sum_over_logits(*static, *args)  # pyright: ignore
    return total, back(tree, front, mask)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _sum_over_logits(row_fn, how, hidden, unembed, rows, mask, needed):
    plain_fn = Static(lambda z, r, _: row_fn(z, r))
    out: Any = map_chunks(plain_fn, how, hidden, unembed, rows, (), needed)
    loss, tree = out
    return jnp.sum(jnp.where(mask, loss, 0.0)), tree


@_sum_over_logits.defjvp
def _sum_jvp(row_fn, how, primals, tangents):
    out, (d_hidden, d_unembed) = _sum_and_gradients(row_fn, how, *primals)
    hidden_dot, unembed_dot, *_ = tangents  # no gradient flows to the rest
    # In their own dtypes, for the backward pass keeps the gradients as they are.
    total_dot = jnp.sum(d_hidden * hidden_dot, dtype=jnp.float32)
    total_dot += jnp.sum(d_unembed * unembed_dot, dtype=jnp.float32)
    return out, (total_dot, jax.tree.map(jnp.zeros_like, out[1]))


def _sum_and_gradients(row_fn, how: How, hidden, unembed, rows, mask, needed):
    def local(by_rows, weights):
        def one_chunk(carry, chunk):
            x, r, counts = chunk
            logits = how.logits(x, weights)
            loss, vjp, tree = jax.vjp(lambda z: row_fn(z, r), logits, has_aux=True)
            counted = vjp(counts.astype(loss.dtype))[0]
            d_hidden, d_weights = gradients(x, weights, counted)
            total = carry[0] + jnp.sum(jnp.where(counts, loss, 0.0))
            return (total, carry[1] + d_weights), (tree, d_hidden)

        zeros = jnp.float32(0.0), how.zeros(weights)
        return how.over_chunks(one_chunk, zeros, by_rows, needed)

    by_rows, weights = (hidden, rows, mask), unembed.astype(hidden.dtype)
    (tree, d_hidden), (total, d_unembed) = how.layout.run(local, by_rows, weights)
    return (total, tree), (d_hidden, d_unembed.astype(unembed.dtype))
