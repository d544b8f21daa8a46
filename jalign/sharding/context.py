"""The context axis: devices share the time of a row that is too long for one of them.

Batches keep whole rows: a token's ids take a few bytes, its hidden states thousands.
The model cuts time with the embedding; whatever sees one token at a time stays with its
share, and attention brings each device the keys of the whole row (`gather_time`).

A query sees the keys before it, so the last share has the most to do. For attention
alone a row is therefore cut into 2 C pieces, of which device i holds pieces 2 i and
2 i + 1: `deal` exchanges them so that it has pieces i and 2 C - 1 - i, as much work as
any other, and `undeal` gives back what came of them. Nothing else knows of it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jalign.sharding.partition import batch_parts, constrain

_AXIS = "context"


def context_parts(mesh: Mesh | AbstractMesh | None) -> int:
    """C: how many devices share the time of a row."""
    return 1 if mesh is None else mesh.shape[_AXIS]


def length_multiple(
    mesh: Mesh | AbstractMesh | None, max_length: int | None = None
) -> int:
    """What the padded length of a row has to be a multiple of: 2 C, or 1 where C is 1.

    Args:
      max_length: a run's, tokens; checked where it is given.

    Raises: ValueError where max_length is no such multiple.
    """
    parts = context_parts(mesh)
    multiple = 2 * parts if parts > 1 else 1
    if mesh is not None and max_length is not None and (odd := max_length % multiple):
        less, more = max_length - odd, max_length - odd + multiple
        fits = f"{less} or {more}" if less else str(more)
        raise ValueError(
            f"--max-length {max_length} is not a multiple of 2 * context = {multiple}, "
            f"into which mesh {dict(mesh.shape)} cuts each row: take {fits}"
        )
    return multiple


def cuts_time(mesh: Mesh | None, length: int) -> bool:
    """Whether attention has a device's share of the queries of such a row only."""
    return context_parts(mesh) > 1 and length % length_multiple(mesh) == 0


def time_to_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[B, T, ...] -> [B * C, T / C, ...], a row for each device's share of a row.

    For what sees one token at a time. Nothing moves, and rows are then cut over all of
    data, fsdp and context. x itself without a context axis, and where B or T do not
    divide over the mesh.
    """
    (B, T, *rest), C, ways = x.shape, context_parts(mesh), batch_parts(mesh)
    if C == 1 or B % ways or T % C:
        return x
    whole = (None,) * len(rest)
    x = constrain(x, mesh, "batch", "time", *whole)
    # By devices first, for a device's rows are to be neighbours.
    x = x.reshape(ways, B // ways, C, T // C, *rest).swapaxes(1, 2)
    x = constrain(x, mesh, "batch", "time", None, None, *whole)
    return constrain(x.reshape(B * C, T // C, *rest), mesh, "share", None, *whole)


def rows_to_time(x: jax.Array, mesh: Mesh | None, batch: int) -> jax.Array:
    """The inverse of `time_to_rows`; batch: B."""
    if x.shape[0] == batch:
        return x
    (rows, share, *rest), C, ways = x.shape, context_parts(mesh), batch_parts(mesh)
    whole = (None,) * len(rest)
    x = constrain(x, mesh, "share", None, *whole)
    x = x.reshape(ways, C, rows // (ways * C), share, *rest)
    x = constrain(x, mesh, "batch", "time", None, None, *whole).swapaxes(1, 2)
    return constrain(x.reshape(batch, -1, *rest), mesh, "batch", "time", *whole)


def _homes() -> list[int]:
    """The device that attends from each of the 2 C pieces."""
    parts = jax.lax.axis_size(_AXIS)
    return [*range(parts), *reversed(range(parts))]


def deal(x: jax.Array) -> jax.Array:
    """Inside of `shard_map`: gives a device's share [B, T / C, ...], two pieces, for
    the two that it attends from; they begin at `dealt_starts`."""
    return _exchange(x, [list(enumerate(_homes()[half::2])) for half in (0, 1)])


def undeal(x: jax.Array) -> jax.Array:
    """The inverse of `deal`."""
    back = [[(at, i) for i, at in enumerate(_homes()[half::2])] for half in (0, 1)]
    return _exchange(x, back)


def _exchange(x: jax.Array, moves: list[list[tuple[int, int]]]) -> jax.Array:
    halves = jnp.split(x, 2, axis=1)
    moved = [
        jax.lax.ppermute(half, _AXIS, move)
        for half, move in zip(halves, moves, strict=True)
    ]
    return jnp.concatenate(moved, axis=1)


def dealt_starts(length: int) -> jax.Array:
    """Inside of `shard_map`: where the two dealt pieces begin in the row, int32 [2].

    Args:
      length: T / C.
    """
    pieces, device = 2 * jax.lax.axis_size(_AXIS), jax.lax.axis_index(_AXIS)
    # Even pieces came from first halves, odd ones from second halves.
    even = jnp.where(device % 2 == 0, device, pieces - 1 - device)
    return jnp.stack([even, pieces - 1 - even]) * (length // 2)


def dealt_order(mesh: Mesh, length: int) -> np.ndarray:
    """The times of a row's tokens, device by device as dealt: int32 [T], T = length."""
    pieces = np.arange(length, dtype=np.int32).reshape(2 * context_parts(mesh), -1)
    count = len(pieces)
    even = [i if i % 2 == 0 else count - 1 - i for i in range(count // 2)]
    return pieces[[at for i in even for at in (i, count - 1 - i)]].reshape(-1)


@jax.custom_vjp
def gather_time(x: jax.Array) -> jax.Array:
    """Inside of `shard_map`: shares [B, T / C, ...] of all devices -> [B, T, ...].

    Its gradient, a sum over the devices, adds up in float32.
    """
    return jax.lax.all_gather(x, _AXIS, axis=1, tiled=True)


def _gather_forward(x):
    return gather_time(x), None


def _gather_backward(_, d_y):
    shares = jax.lax.psum_scatter(
        d_y.astype(jnp.float32), _AXIS, scatter_dimension=1, tiled=True
    )
    return (shares.astype(d_y.dtype),)


gather_time.defvjp(_gather_forward, _gather_backward)
