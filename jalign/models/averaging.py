"""One model of several, array by array: x_i of model i, x_0 of the base they came from.

t_i = x_i - x_0 is model i's task vector, w_i its weight. Functions of arrays of one
shape: apply them to each parameter, under `jax.jit` or not, on a mesh or not. They
compute in float32, and return that. Other shapes, or weights of another number, raise
ValueError.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Arrays = Sequence[ArrayLike]
Weights = Sequence[float] | None
# Of the cosine: beyond it, angles are too small (or close to pi) to divide by.
_COLINEAR = 0.9995


def linear(models: Arrays, *, weights: Weights = None) -> jax.Array:
    """sum_i w_i x_i / sum_i w_i: a model soup (Wortsman et al. 2022, arXiv:2203.05482).

    Equal models give that model, bit for bit.

    Args:
      models: x_i, of one shape.
      weights: w_i; None takes 1 for each. Their sum must be positive.

    Raises: ValueError for weights that do not fit.
    """
    xs, ws = _float32(models), _weights(models, weights)
    if sum(ws) <= 0:
        raise ValueError(f"weights: the sum of {ws} is not positive")
    # From the model that counts most, so that equal ones leave it as it is.
    first = ws.index(max(ws))
    steps = [w / sum(ws) * (x - xs[first]) for w, x in zip(ws, xs, strict=True)]
    del steps[first]
    return _moved(xs[first], steps)


def slerp(models: Arrays, *, t: float = 0.5) -> jax.Array:
    """(sin((1 - t) a) x_1 + sin(t a) x_2) / sin(a), with a the angle between them.

    Spherical linear interpolation (Shoemake 1985, doi:10.1145/325165.325242) of whole
    arrays as vectors, which are not normalized. Where their cosine is beyond +-0.9995,
    or one of them is 0, it is linear: (1 - t) x_1 + t x_2.

    Args:
      models: two of them.
      t: 0 gives the first and 1 the second, bit for bit.

    Raises: ValueError for another number of models.
    """
    if len(models) != 2:
        raise ValueError(f"slerp is of two models, got {len(models)}")
    first, second = _float32(models)
    if t in (0, 1):
        return second if t else first
    sizes = jnp.sqrt(_dot(first, first) * _dot(second, second))
    cosine = _dot(first, second) / jnp.where(sizes == 0, 1.0, sizes)
    angle = jnp.arccos(jnp.clip(cosine, -1.0, 1.0))
    straight = (jnp.abs(cosine) > _COLINEAR) | (sizes == 0)
    sine = jnp.where(straight, 1.0, jnp.sin(angle))
    left = jnp.where(straight, 1 - t, jnp.sin((1 - t) * angle) / sine)
    right = jnp.where(straight, t, jnp.sin(t * angle) / sine)
    return left * first + right * second


def task_arithmetic(
    models: Arrays, base: ArrayLike, *, weights: Weights = None, scale: float = 1.0
) -> jax.Array:
    """x_0 + scale sum_i w_i t_i (Ilharco et al. 2022, arXiv:2212.04089).

    Args:
      models, base: x_i and x_0, of one shape.
      weights: w_i; None takes 1 for each, a negative one takes a task away.
      scale: the paper's lambda.
    """
    return _moved(_float32([base])[0], _tasks(models, base, weights), scale)


def ties(
    models: Arrays,
    base: ArrayLike,
    *,
    density: float = 0.2,
    weights: Weights = None,
    scale: float = 1.0,
) -> jax.Array:
    """x_0 + scale m: TIES-Merging (Yadav et al. 2023, arXiv:2306.01708).

    Of each t_i the largest entries stay, see `trim`. At each place the sign of
    sum_i w_i t_i is elected (0 counts as +), and m is sum_i w_i t_i / sum_i w_i over
    the t_i of that sign, 0 where there is none.

    Args:
      models, base: x_i and x_0, of one shape.
      density: share of the entries that stay; of each array, where the paper takes the
        share of the whole model.
      weights: w_i >= 0; None takes 1 for each, which is the paper's.
      scale: the paper's lambda.

    Raises: ValueError for weights that do not fit.
    """
    ws = _weights(models, weights)
    if min(ws) < 0:
        raise ValueError(f"weights: of {ws} one is negative; ties takes means")
    tasks = [trim(task, density) for task in _tasks(models, base, None)]
    kept = _elected([w * task for w, task in zip(ws, tasks, strict=True)])
    total = sum(w * (task != 0) for w, task in zip(ws, kept, strict=True))
    mean = sum(kept) / jnp.where(total == 0, 1.0, total)
    return _moved(_float32([base])[0], [mean], scale)


def dare_linear(
    models: Arrays,
    base: ArrayLike,
    *,
    key: jax.Array,
    density: float = 0.1,
    weights: Weights = None,
    scale: float = 1.0,
) -> jax.Array:
    """`task_arithmetic` of what `drop` leaves (DARE, Yu et al. 2023, arXiv:2311.03099).

    Args:
      models, base, weights, scale: as of `task_arithmetic`.
      key: typed PRNG key.
      density: share of the entries that stay, the paper's 1 - p.
    """
    tasks = _dropped(_tasks(models, base, weights), density, key)
    return _moved(_float32([base])[0], tasks, scale)


def dare_ties(
    models: Arrays,
    base: ArrayLike,
    *,
    key: jax.Array,
    density: float = 0.1,
    weights: Weights = None,
    scale: float = 1.0,
) -> jax.Array:
    """x_0 + scale sum_i w_i t_i over the t_i of the elected sign, see `ties`.

    With `drop` (arXiv:2311.03099) in the place of `trim`. A sum and no mean: of what is
    dropped in one model, nothing is left for the others to be divided by.

    Args: as of `dare_linear`.
    """
    tasks = _dropped(_tasks(models, base, weights), density, key)
    return _moved(_float32([base])[0], _elected(tasks), scale)


def trim(task: jax.Array, density: float) -> jax.Array:
    """The largest entries of a task vector by size; the others are 0.

    Args:
      task: float32, n entries.
      density: in (0, 1]; int(density n) entries stay, at least one, and those that are
        as large as the last of them.
    """
    _check_density(density)
    size = jnp.abs(task)
    count = max(1, int(density * task.size))
    return jnp.where(size >= _kth_largest(size, count), task, 0.0)


def drop(task: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Each entry with probability `density` divided by it, else 0 (arXiv:2311.03099).

    The mean over keys is `task`.

    Args:
      task: float32.
      density: in (0, 1], the paper's 1 - p.
      key: typed PRNG key.
    """
    _check_density(density)
    stays = jax.random.bernoulli(key, float(density), task.shape)
    return jnp.where(stays, task / density, 0.0)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


def _float32(arrays: Arrays) -> list[jax.Array]:
    xs = [jnp.asarray(x).astype(jnp.float32) for x in arrays]
    for x in xs:
        if x.shape != xs[0].shape:
            raise ValueError(f"arrays of shapes {xs[0].shape} and {x.shape}")
    return xs


def _weights(models: Arrays, weights: Weights) -> list[float]:
    if weights is not None and len(weights) != len(models):
        raise ValueError(f"weights: {len(weights)} for {len(models)} models")
    return [1.0] * len(models) if weights is None else [*map(float, weights)]


def _tasks(models: Arrays, base: ArrayLike, weights: Weights) -> list[jax.Array]:
    """w_i t_i of each model."""
    start, *xs = _float32([base, *models])
    ws = _weights(models, weights)
    return [w * (x - start) for w, x in zip(ws, xs, strict=True)]


def _moved(start: jax.Array, steps: Arrays, scale: float = 1.0) -> jax.Array:
    """start + scale * the sum of the steps; -0.0 stays itself where that is 0."""
    step = sum(steps, jnp.zeros_like(start))
    return jnp.where(step == 0, start, start + scale * step)


def _dropped(tasks: list[jax.Array], density: float, key) -> list[jax.Array]:
    keys = [jax.random.fold_in(key, number) for number in range(len(tasks))]
    return [drop(x, density, k) for x, k in zip(tasks, keys, strict=True)]


def _elected(tasks: list[jax.Array]) -> list[jax.Array]:
    """Of each what has the sign of their sum, in which 0 counts as +; the rest is 0."""
    positive = sum(tasks) >= 0
    return [jnp.where((task > 0) == positive, task, 0.0) for task in tasks]


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Of two arrays as vectors; XLA adds in a tree, so that large ones lose nothing."""
    return jnp.sum(x * y)


@jax.jit
def _kth_largest(sizes: jax.Array, k: ArrayLike) -> jax.Array:
    """The k-th largest of float32 values >= 0, by their 31 bits from the highest on:
    in memory and time far below a sort, which would also gather a mesh's shards."""
    bits = jax.lax.bitcast_convert_type(sizes, jnp.int32)  # ordered as the values are

    def narrow(number, low):
        higher = low | (1 << (30 - number))
        return jnp.where((bits >= higher).sum() >= k, higher, low)

    found = jax.lax.fori_loop(0, 31, narrow, jnp.int32(0))
    return jax.lax.bitcast_convert_type(found, jnp.float32)
