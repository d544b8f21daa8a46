"""Functions of the logits, computed a chunk of tokens at a time, never [B, T, V]."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, PyTree

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
      chunk_size: tokens per chunk over the whole (global) batch. On a mesh multiply
        by the number of devices over which the batch is split.

    Returns: the tree of [B, T] that row_fn gives.
    Raises: AssertionError at trace time on wrong rank, shape or dtype, ValueError if
      chunk_size < 1.
    """
    _check(hidden, unembed, rows, chunk_size)
    rows, consts = jax.lax.stop_gradient((rows, consts))
    row_fn = _Static(row_fn)
    return _map_logits(row_fn, chunk_size, hidden, unembed, rows, consts)


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
    taken right after its loss, and its logits are computed once, not twice.

    Args:
      row_fn: (logits float32 [R, S, V], rows) -> (loss [R, S], tree of [R, S]); as of
        `map_logits`. No gradient flows through the tree.
      hidden, unembed, rows, chunk_size: as of `map_logits`.
      mask: bool [B, T], True where the loss counts.

    Returns: (the sum of the loss where the mask is True, float32 []; the tree [B, T]).
    Raises: as `map_logits`.
    """
    _check(hidden, unembed, (rows, mask), chunk_size)
    chex.assert_type(mask, jnp.bool_)
    rows = jax.lax.stop_gradient(rows)
    row_fn = _Static(row_fn)
    return _sum_over_logits(row_fn, chunk_size, hidden, unembed, rows, mask)  # pyright: ignore


def _check(hidden, unembed, rows, chunk_size: int) -> None:
    chex.assert_rank([hidden, unembed], [3, 2])
    chex.assert_type([hidden, unembed], float)
    chex.assert_equal(hidden.shape[2], unembed.shape[0])
    chex.assert_tree_shape_prefix(rows, hidden.shape[:2])
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


class _Static:
    """A row function compared by what it does, so that equal partials share a trace."""

    def __init__(self, fn: RowFn):
        self.fn = fn
        self.identity: tuple = (fn,)
        if isinstance(fn, functools.partial):
            self.identity = (fn.func, fn.args, tuple(sorted(fn.keywords.items())))

    def __call__(self, *args):
        return self.fn(*args)

    def __eq__(self, other):
        return isinstance(other, _Static) and self.identity == other.identity

    def __hash__(self):
        return hash(self.identity)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map_logits(row_fn, chunk_size, hidden, unembed, rows, consts):
    batch, time, _ = hidden.shape
    grid = _grid(batch, time, chunk_size)
    weights = unembed.astype(hidden.dtype)

    def one_chunk(chunk):
        x, r = chunk
        return row_fn(_logits(x, weights), r, consts)

    out = jax.lax.map(one_chunk, _split((hidden, rows), grid))
    return _join(out, grid, batch, time)


def _forward(row_fn, chunk_size, hidden, unembed, rows, consts):
    out = _map_logits(row_fn, chunk_size, hidden, unembed, rows, consts)
    return out, (hidden, unembed, rows, consts)


def _backward(row_fn, chunk_size, residuals, cotangents):
    hidden, unembed, rows, consts = residuals
    batch, time, _ = hidden.shape
    grid = _grid(batch, time, chunk_size)
    weights = unembed.astype(hidden.dtype)

    def one_chunk(d_unembed, chunk):
        x, r, g = chunk
        _, vjp = jax.vjp(lambda z: row_fn(z, r, consts), _logits(x, weights))
        d_hidden, d_weights = _gradients(x, weights, vjp(g)[0])
        return d_unembed + d_weights, d_hidden

    zeros = jnp.zeros_like(unembed, jnp.float32)
    chunks = _split((hidden, rows, cotangents), grid)
    d_unembed, d_hidden = jax.lax.scan(one_chunk, zeros, chunks)
    d_hidden = _join(d_hidden, grid, batch, time)
    return d_hidden, d_unembed.astype(unembed.dtype), None, None


_map_logits.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_over_logits(row_fn, chunk_size, hidden, unembed, rows, mask):
    plain_fn = _Static(lambda z, r, _: row_fn(z, r))
    out: Any = _map_logits(plain_fn, chunk_size, hidden, unembed, rows, ())
    loss, tree = out
    return jnp.sum(jnp.where(mask, loss, 0.0)), tree


def _sum_forward(row_fn, chunk_size, hidden, unembed, rows, mask):
    batch, time, _ = hidden.shape
    grid = _grid(batch, time, chunk_size)
    weights = unembed.astype(hidden.dtype)

    def one_chunk(carry, chunk):
        x, r, counts = chunk
        loss, vjp, tree = jax.vjp(
            lambda z: row_fn(z, r), _logits(x, weights), has_aux=True
        )
        d_hidden, d_weights = _gradients(x, weights, vjp(counts.astype(loss.dtype))[0])
        total = carry[0] + jnp.sum(jnp.where(counts, loss, 0.0))
        return (total, carry[1] + d_weights), (tree, d_hidden)

    zeros = jnp.float32(0.0), jnp.zeros_like(unembed, jnp.float32)
    chunks = _split((hidden, rows, mask), grid)
    (total, d_unembed), outs = jax.lax.scan(one_chunk, zeros, chunks)
    tree, d_hidden = _join(outs, grid, batch, time)
    return (total, tree), (d_hidden, d_unembed.astype(unembed.dtype))


def _sum_backward(row_fn, chunk_size, gradients, cotangents):
    scale = cotangents[0]
    d_hidden, d_unembed = (g * scale.astype(g.dtype) for g in gradients)
    return d_hidden, d_unembed, None, None


_sum_over_logits.defvjp(_sum_forward, _sum_backward)


def _gradients(x, weights, d_logits):
    """Of hidden, in its dtype, and of the unembedding, float32."""
    d_logits = d_logits.astype(x.dtype)
    d_hidden = _product("bsv,dv->bsd", d_logits, weights).astype(x.dtype)
    # As split as the weights are: on a mesh of explicit axes it has to be said.
    sharding = jax.typeof(weights).sharding
    return d_hidden, _product("bsd,bsv->dv", x, d_logits, out_sharding=sharding)


def _product(spec: str, a: jax.Array, b: jax.Array, **options) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, **options)


def _logits(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    return _product("bsd,dv->bsv", hidden, weights)


def _grid(batch: int, time: int, chunk_size: int) -> tuple[int, int]:
    """(pieces of the batch axis, pieces of the time axis); chunks = their product."""
    pieces_b = -(-batch // chunk_size)
    positions = max(1, chunk_size // max(1, batch))
    return max(1, pieces_b), max(1, -(-time // positions))


def _split(tree: PyTree, grid: tuple[int, int]) -> PyTree:
    """[B, T, ...] -> [chunks, R, S, ...], padded with zeros to a multiple."""
    pieces_b, pieces_t = grid

    def split(x):
        pad = [(0, -x.shape[0] % pieces_b), (0, -x.shape[1] % pieces_t)]
        x = jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2))
        b, t, *rest = x.shape
        # Rows are dealt out with a stride, so that each chunk has some of each shard.
        x = x.reshape(b // pieces_b, pieces_b, pieces_t, t // pieces_t, *rest)
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(pieces_b * pieces_t, *x.shape[2:])

    return jax.tree.map(split, tree)


def _join(tree: PyTree, grid: tuple[int, int], batch: int, time: int):
    """The inverse of _split: [chunks, R, S, ...] -> [B, T, ...]."""
    pieces_b, pieces_t = grid

    def join(x):
        x = x.reshape(pieces_b, pieces_t, *x.shape[1:])
        x = jnp.moveaxis(x, 2, 0)
        x = x.reshape(x.shape[0] * pieces_b, pieces_t * x.shape[3], *x.shape[4:])
        return x[:batch, :time]

    return jax.tree.map(join, tree)
