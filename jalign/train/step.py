"""The training step: micro-batches, one division, a guard against non-finite steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jalign import sharding
from jalign.models import lora
from jalign.train.objectives import Objective
from jalign.train.optim import current_learning_rate
from jalign.types import Loss, PyTree, TrainState

TrainStep = Callable[..., tuple[TrainState, dict[str, jax.Array]]]
"""(state, batch), or (state, batch, frozen) -> (state, metrics)."""


def init_state(
    params: PyTree | Callable[[jax.Array], PyTree],
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step, laid out over the mesh.

    Args:
      params: parameters, or a function key -> parameters (`model.init`), which then
        runs inside the jit so that no device ever holds the whole model. Arrays are
        taken over where they lie as the mesh wants them, not copied: the first step
        donates them. Pass `jax.tree.map(jnp.copy, params)` to keep yours.
      tx: of make_optimizer, or any optax transformation.
      key: typed PRNG key []; each step folds its number into it, so it never changes.
      mesh: None leaves everything where it is.
    """

    def make(given: Any, key):
        return _fresh(params(key) if callable(params) else given, tx, key)

    given = None if callable(params) else params
    shardings = None
    if mesh is not None:
        shardings = sharding.state_shardings(mesh, jax.eval_shape(make, given, key))
    if given is None:
        return jax.jit(make, out_shardings=shardings)(given, key)
    given = _laid_out(given, shardings and shardings.params)
    # Parameters go past the jit, which would return copies of them.
    rest = jax.jit(
        lambda given, key: make(given, key)._replace(params=None),
        out_shardings=shardings and shardings._replace(params=None),
    )
    return rest(given, key)._replace(params=given)


def _laid_out(params: PyTree, shardings: PyTree | None) -> PyTree:
    """The parameters themselves where they lie right, else copies that do."""

    def right(x, place=None) -> bool:
        return isinstance(x, jax.Array) and (
            place is None or x.sharding.is_equivalent_to(place, x.ndim)
        )

    trees = (params,) if shardings is None else (params, shardings)
    if all(jax.tree.leaves(jax.tree.map(right, *trees))):
        return params
    return jax.jit(lambda x: x, out_shardings=shardings)(params)


def _fresh(params: PyTree, tx: optax.GradientTransformation, key) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), key)


def abstract_state(
    param_shapes: PyTree,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of a state, without allocating it (for restore)."""
    shapes = jax.eval_shape(lambda p: _fresh(p, tx, jax.random.key(0)), param_shapes)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        sharding.state_shardings(mesh, shapes),
    )


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    state_shardings: PyTree | None = None,
    schedule: optax.Schedule | None = None,
    name: str = "the training step",
    dropout: float = 0.0,
) -> TrainStep:
    """A jitted step(state, batch, frozen=None) -> (state, metrics), donating the state.

    Gradients and (sum, count) of the micro-batches are added in float32 and divided
    once by the global count, so the result does not depend on `microbatches` or on
    the mesh. A step whose loss or gradient is not finite changes neither parameters
    nor optimizer state; one whose new parameters are not (a learning rate of inf)
    leaves the parameters. Both report skipped = 1.

    Args:
      objective: (params, batch, key) -> Loss, see objectives.py.
      tx: the optax transformation that made state.opt_state.
      microbatches: parts that the batch is cut into; must divide its rows.
      state_shardings: TrainState of shardings to pin the new state to (None: jax's
        choice). `sharding.state_shardings(mesh, state)` makes it.
      schedule: reports `learning_rate` if given.
      name: what it is called where its compilation is logged.
      dropout: of adapters, see lora.with_dropout.

    Returns: step. With `frozen`, parameters that are neither trained nor donated, the
      objective sees those and state.params in one tree, as lora.join has it. Its
      metrics are float32 []: loss, grad_norm (before clipping), skipped, num_tokens,
      learning_rate, and the objective's own as sum / count.
    """

    def step(state: TrainState, batch, frozen: PyTree | None = None):
        def on_whole(params, batch, key):
            whole = params if frozen is None else lora.join(frozen, params)
            if dropout:
                whole = lora.with_dropout(whole, jax.random.fold_in(key, 1), dropout)
            return objective(whole, batch, key)

        key = jax.random.fold_in(state.key, state.step)
        loss, grads = accumulate(on_whole, state.params, batch, key, microbatches)
        count = jnp.maximum(loss.count, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        grad_norm = optax.global_norm(grads)
        ok = jnp.isfinite(loss.sum) & jnp.isfinite(grad_norm)
        metrics: dict[str, Any] = {
            "loss": loss.sum / count,
            "grad_norm": grad_norm,
            "num_tokens": num_tokens(batch),
        } | {name: s / jnp.maximum(n, 1.0) for name, (s, n) in loss.metrics.items()}
        if schedule is not None:
            rate = current_learning_rate(state.opt_state, schedule)
            metrics["learning_rate"] = jnp.asarray(rate, jnp.float32)
        params, opt_state, ok = guarded_update(tx, state, grads, ok)
        metrics["skipped"] = 1.0 - ok.astype(jnp.float32)
        return state._replace(
            step=state.step + 1, params=params, opt_state=opt_state
        ), metrics

    options: dict[str, Any] = {"donate_argnums": 0}
    if state_shardings is not None:
        options["out_shardings"] = (state_shardings, None)

    def words(state, batch, frozen=None):
        return sharding.batch_words(name, batch)

    return sharding.announced(step, words, **options)


def guarded_update(
    tx: optax.GradientTransformation, state: TrainState, grads: PyTree, ok: jax.Array
) -> tuple[PyTree, PyTree, jax.Array]:
    """(params, opt_state, whether the step was taken); the old ones, bit for bit,
    where `ok` is False.

    New parameters of no finite norm are not taken either. The optimizer's state has
    moved then, by a finite gradient: to keep the old one until the parameters are
    known would hold moments and parameters twice.
    """
    # Zeroed before the update: 0 * NaN would put NaN into the moments.
    grads = jax.tree.map(lambda g: jnp.where(ok, g, 0.0), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    def choose(ok, new, old):
        return jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, old)

    opt_state = choose(ok, opt_state, state.opt_state)
    ok &= jnp.isfinite(optax.global_norm(params))
    return choose(ok, params, state.params), opt_state, ok


def accumulate(
    objective: Objective, params: PyTree, batch, key: jax.Array, microbatches: int
) -> tuple[Loss, PyTree]:
    """(Loss, float32 gradient of Loss.sum), both summed over the micro-batches."""

    def scalar(params, batch, key):
        loss = objective(params, batch, key)
        return loss.sum, loss

    def one(batch, key):
        grads, loss = jax.grad(scalar, has_aux=True)(params, batch, key)
        return loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if microbatches == 1:
        return one(batch, key)
    parts = split_microbatches(batch, microbatches)
    keys = jax.random.split(key, microbatches)

    def body(total, part):
        loss, grads = one(*part)
        return (
            add_losses(total[0], loss),
            jax.tree.map(jnp.add, total[1], grads),
        ), None

    shapes, _ = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], (parts, keys)))
    # zeros_like keeps the parameters' layout, so that the sum is sharded as they are.
    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    return jax.lax.scan(body, (empty_loss(shapes), zeros), (parts, keys))[0]


def empty_loss(shapes: Loss) -> Loss:
    """What adding to it leaves unchanged; shapes: of jax.eval_shape."""

    zero = jnp.float32(0.0)
    starts = {"min_": jnp.float32(jnp.inf), "max_": jnp.float32(-jnp.inf)}
    metrics = {name: (starts.get(name[:4], zero), zero) for name in shapes.metrics}
    return Loss(zero, zero, metrics)


def split_microbatches(batch, microbatches: int):
    """Leaves [B, ...] -> [n, B/n, ...]; part i takes the rows i, i + n, i + 2n, ...

    Strided, so that each part lies evenly over devices that hold blocks of rows.

    Raises: ValueError when the rows do not divide.
    """

    def split(x):
        if x.shape[0] % microbatches:
            raise ValueError(
                f"microbatches {microbatches} does not divide the batch's "
                f"{x.shape[0]} rows"
            )
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def add_losses(a: Loss, b: Loss) -> Loss:
    """The Loss of two micro-batches together; min_* and max_* stay extremes."""

    def merge(name):
        (x, n), (y, m) = a.metrics[name], b.metrics[name]
        extreme = {"min_": jnp.minimum, "max_": jnp.maximum}.get(name[:4])
        return (extreme(x, y), jnp.maximum(n, m)) if extreme else (x + y, n + m)

    metrics = {name: merge(name) for name in a.metrics}
    return Loss(a.sum + b.sum, a.count + b.count, metrics)


def num_tokens(batch) -> jax.Array:
    """Tokens of all rows of a batch, prompts included, padding not; float32 []."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    counts = [
        jnp.sum(leaf > 0)
        for path, leaf in leaves
        if path and getattr(path[-1], "name", "") == "segment_ids"
    ]
    return jnp.asarray(sum(counts), jnp.float32)
