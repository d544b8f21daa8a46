"""Tables x shapes -> NamedShardings, strictly; and constraints on activations."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jalign.sharding.rules import (
    AXIS_RULES,
    PARAM_RULES,
    LogicalAxes,
    ParamRules,
    axes_of,
    bends,
)

PyTree = Any
AxisRules = Mapping[str, tuple[str, ...]]


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 (rows) cut over data and fsdp, the other axes whole, time among them."""
    return NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))


def batch_parts(mesh: Mesh | None) -> int:
    """How many parts the rows of a batch are cut into, over all devices."""
    if mesh is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in AXIS_RULES["batch"])


def constrain(x: jax.Array, mesh: Mesh | None, *logical_axes: str | None) -> jax.Array:
    """Asks the compiler to lay x out along the mesh; values do not change.

    A hint, so it bends where weights are strict: a mesh axis that does not divide its
    dimension (3 prompts on 8 devices) is left out. No-op without a mesh and on one
    device.

    Args:
      x: an array of rank len(logical_axes).
      mesh: of make_mesh, or None.
      logical_axes: a name from rules.AXIS_RULES, or None, for each axis of x.

    Returns: x.
    Raises: ValueError for an unknown name, a wrong rank, or a mesh axis used twice.
    """
    if mesh is None or mesh.size == 1:
        return x
    place = activation_sharding(mesh, x.shape, *logical_axes)
    return jax.lax.with_sharding_constraint(x, place)


def activation_sharding(
    mesh: Mesh | AbstractMesh, shape: Sequence[int], *logical_axes: str | None
) -> NamedSharding:
    """Where `constrain` and `shard_map` have an activation of this shape."""
    return NamedSharding(mesh, fitting_spec(mesh, shape, logical_axes))


def shard_map(
    fn: Callable, mesh: Mesh | None, in_axes: Sequence[Any], out_axes: Any
) -> Callable:
    """fn on each device's shards, for kernels that the partitioner cannot cut.

    Args:
      fn: function of arrays that is independent along the axes that are cut.
      mesh: None or one device: fn itself.
      in_axes: logical axes of each argument; axes that do not divide stay whole, so
        make both operands of a product divide alike (repeat kv heads first). Of a
        tree, that of its specs.
      out_axes: logical axes of the output, or a tuple of such tuples; cut as the
        arguments' dimensions of the same name are.
    """
    if mesh is None or mesh.size == 1:
        return fn

    @functools.wraps(fn)
    def wrapped(*args):
        specs, cut = [], {}
        for x, axes in zip(args, in_axes, strict=True):
            spec = axes
            if isinstance(axes, tuple):
                spec = fitting_spec(mesh, x.shape, axes)
                cut |= dict(zip(axes, spec, strict=True))
            specs.append(spec)

        def of(axes):
            if axes and isinstance(axes[0], tuple):
                return tuple(of(one) for one in axes)
            return PartitionSpec(*(cut.get(name) for name in axes))

        return jax.shard_map(
            fn,
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=of(out_axes),
            check_vma=False,
        )(*args)

    return wrapped


def param_shardings(
    mesh: Mesh | AbstractMesh,
    shapes: PyTree,
    *,
    param_rules: ParamRules = PARAM_RULES,
    axis_rules: AxisRules = AXIS_RULES,
) -> PyTree:
    """A NamedSharding for every parameter, from the two tables, or an error.

    Args:
      mesh: of make_mesh or abstract_mesh.
      shapes: nested dict whose leaves have a .shape (arrays or ShapeDtypeStructs).
      param_rules: (path regex, logical axes) pairs, see rules.PARAM_RULES.
      axis_rules: logical axis -> mesh axes, see rules.AXIS_RULES.

    Returns: the same tree with NamedSharding leaves.
    Raises: ValueError naming the path, when no rule matches it, the rank is another,
      a mesh axis would cut two dimensions, or a mesh axis does not divide a dimension
      (kv_heads, and the axes of quantized kernels, are replicated then instead).
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, _param_spec(mesh, join(path), leaf.shape, param_rules, axis_rules)
        ),
        shapes,
    )


def state_shardings(
    mesh: Mesh | AbstractMesh,
    state_shapes: PyTree,
    *,
    param_rules: ParamRules = PARAM_RULES,
) -> PyTree:
    """Shardings for a TrainState: optimizer moments lie where their parameters do.

    A leaf whose path ends in a parameter's path and that has its shape gets that
    parameter's sharding; steps, keys and factored moments are replicated.

    Args:
      mesh: of make_mesh or abstract_mesh.
      state_shapes: a NamedTuple with a field `params` (jax.eval_shape of init_state).
      param_rules: as in param_shardings.

    Returns: the same tree with NamedSharding leaves.
    Raises: ValueError as param_shardings does.
    """
    params = jax.tree_util.tree_leaves_with_path(state_shapes.params)
    shardings = param_shardings(mesh, state_shapes.params, param_rules=param_rules)
    known = {
        "/" + join(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            params, jax.tree.leaves(shardings), strict=True
        )
    }
    longest_first = sorted(known, key=len, reverse=True)

    def place(path, leaf):
        name = "/" + join(path)
        for suffix in longest_first:
            if name.endswith(suffix) and known[suffix][0] == leaf.shape:
                return known[suffix][1]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state_shapes)


def join(path) -> str:
    """A leaf's path, as the rules have it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _param_spec(mesh, path, shape, param_rules, axis_rules) -> PartitionSpec:
    axes = axes_of(path, param_rules)
    if axes is None:
        raise ValueError(f"parameter {path} {tuple(shape)}: no sharding rule matches")
    if len(axes) != len(shape):
        raise ValueError(
            f"parameter {path}: shape {tuple(shape)} has {len(shape)} axes, its "
            f"sharding rule {axes} has {len(axes)}"
        )
    parts = [_mesh_axes(name, axis_rules, path) for name in axes]
    for dim, (size, name) in enumerate(zip(shape, axes, strict=True)):
        cut = "*".join(parts[dim])
        ways = math.prod(mesh.shape[axis] for axis in parts[dim])
        if size % ways and bends(path, name):
            parts[dim] = ()
        elif size % ways:
            raise ValueError(
                f"parameter {path}: dimension {dim} ({name}) of {tuple(shape)} has "
                f"{size} elements, which mesh axis {cut} of size {ways} does not "
                f"divide; choose a {cut} size that does"
            )
    return _spec(mesh, parts, path)


def fitting_spec(
    mesh: Mesh | AbstractMesh,
    shape: Sequence[int],
    axes: LogicalAxes,
    axis_rules: AxisRules = AXIS_RULES,
) -> PartitionSpec:
    """The spec of an array, without the mesh axes that do not divide its dimensions.

    Raises: ValueError as `constrain`.
    """
    if len(axes) != len(shape):
        raise ValueError(f"shape {tuple(shape)} has not the axes {axes}")
    parts = []
    for size, name in zip(shape, axes, strict=True):
        part = ()
        for axis in _mesh_axes(name, axis_rules, "activation"):
            ways = math.prod(mesh.shape[a] for a in (*part, axis))
            part = (*part, axis) if size % ways == 0 else part
        parts.append(part)
    return _spec(mesh, parts, f"activation {axes}")


def _mesh_axes(name: str | None, axis_rules: AxisRules, where: str) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in axis_rules:
        raise ValueError(
            f"{where}: no logical axis {name!r}; have {sorted(axis_rules)}"
        )
    return axis_rules[name]


def _spec(mesh, parts: Sequence[tuple[str, ...]], where: str) -> PartitionSpec:
    """One entry per dimension, no axis of size 1: so equal layouts compare equal."""
    used = [axis for part in parts for axis in part]
    twice = sorted({axis for axis in used if used.count(axis) > 1})
    if twice:
        raise ValueError(f"{where}: mesh axis {twice[0]} cuts two dimensions: {parts}")
    real = [tuple(axis for axis in part if mesh.shape[axis] > 1) for part in parts]
    return PartitionSpec(
        *(part[0] if len(part) == 1 else part or None for part in real)
    )
