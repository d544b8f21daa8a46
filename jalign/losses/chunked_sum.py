"""The sum of a loss of the logits, with its gradient taken in the forward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jalign.losses.chunked import (
    DEFAULT_CHUNK_SIZE,
    RowFn,
    Static,
    check,
    gradients,
    logits_of,
    map_chunks,
    over_chunks,
)
from jalign.losses.elementwise import Array, PyTree
from jalign.losses.fronted import back, make_front, to_front
from jalign.losses.grid import chunk_grid, join_chunks, split_chunks


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
