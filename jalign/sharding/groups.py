"""Logits and embeddings on a mesh: fsdp x context in groups, the wide axis cut in each.

A device that computes all logits of its own tokens needs all of the unembedding and has
a gradient of all of it; one that computes its share of the vocabulary for everyone's
tokens is sent all of their hidden states. In between, fsdp x context is cut into
groups: the members of a group share their tokens and cut the vocabulary. 1 / members of
the unembedding is gathered over the groups, and of its gradient reduced over them,
once. With the embedding it is the same, but that the members cut its features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jalign.sharding.partition import fitting_spec
from jalign.sharding.rules import GROUP_RULES

PyTree = Any
LANES = 128
"""Numbers of the last axis that a TPU keeps side by side; fewer take as much room."""


class Groups(NamedTuple):
    """A mesh with fsdp x context = groups x members.

    Attributes:
      mesh: the model's devices in their order, with axes data, groups, members, tensor.
    """

    mesh: Mesh

    @property
    def groups(self) -> int:
        """Parts of the rows of a batch, over all devices."""
        return self.mesh.shape["data"] * self.mesh.shape["groups"]

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Asks for x cut by rules.GROUP_RULES; axes that are not named stay whole."""
        axes += (None,) * (x.ndim - len(axes))
        spec = fitting_spec(self.mesh, x.shape, axes, GROUP_RULES)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def run(
        self,
        local: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
        by_rows: PyTree,
        weights: PyTree,
    ) -> tuple[PyTree, PyTree]:
        """`local` of each group's rows.

        Args:
          local: (rows of a group, weights) -> (tree of its rows, tree of sums over
            them: scalars, or of the weights' shape). What it places has no axis for
            the groups.
          by_rows: tree of [B, ...], cut over data, fsdp and context.
          weights: tree of [D, V], cut as parameters are. Gathered once.

        Returns: (tree of [B, ...], sums over all rows, cut as the weights are).
        """
        split = functools.partial(jax.tree.map, self._split)
        join = functools.partial(jax.tree.map, self._join)
        each = jax.vmap(local, in_axes=(0, None), spmd_axis_name=("data", "groups"))
        rows, sums = each(split(by_rows), jax.tree.map(self._gather, weights))
        both = join(rows), jax.tree.map(self._add_up, sums)
        # Else the sums of a group, whole, may wait behind the layers' backward pass.
        return jax.lax.optimization_barrier(both)

    def _split(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.groups, -1, *x.shape[1:])
        return self.place(x, "group", "row")

    def _join(self, x: jax.Array) -> jax.Array:
        x = self.place(x, "group", "row").reshape(-1, *x.shape[2:])
        return self.place(x, "batch")

    def _gather(self, x: jax.Array) -> jax.Array:
        # Two moves, an exchange in the group and a gather over the groups: asked for
        # both at once the compiler gathers all of it and drops what it does not need.
        return self.place(self.place(x, "embed_of_group", "vocab"), None, "vocab")

    def _add_up(self, x: jax.Array) -> jax.Array:
        x = x.sum(0)
        if x.ndim != 2:
            return x
        return self.place(self.place(x, "embed_of_group", "vocab"), "embed", "stored")


@functools.lru_cache(maxsize=64)
def logits_groups(
    mesh: Mesh | None, batch: int, length: int, vocab_size: int
) -> Groups | None:
    """The groups with which the logits of [batch, length] tokens move few bytes.

    Rows are those of context.time_to_rows.

    Of t tokens a device, groups of k members send 8 k t D bytes of hidden states and of
    their gradients, and 8 V D / k of the unembedding: least where k^2 = V / t.

    Returns: None on one device, and where the rows do not divide over the devices, or
      the vocabulary over `tensor`.
    """
    members = logits_members(mesh, batch, length, vocab_size)
    return _groups_of(mesh, members) if mesh is not None and members else None


def logits_members(
    mesh: Mesh | AbstractMesh | None, batch: int, length: int, vocab_size: int
) -> int | None:
    """k of `logits_groups`, also for a mesh without devices."""
    if mesh is None or mesh.size == 1:
        return None
    tensor = mesh.shape["tensor"]
    ways = mesh.size // tensor
    if batch % ways:
        return None
    tokens = max(1, batch * length // ways)
    sizes = [k for k in _divisors(mesh) if not vocab_size % (tensor * k)]
    enough = (k for k in sizes if k * k * tokens >= vocab_size)
    return next(enough, sizes[-1]) if sizes else None


@functools.lru_cache(maxsize=64)
def embedding_groups(mesh: Mesh | None, features: int) -> Groups | None:
    """The groups whose members hold the fewest features of all tokens, by LANES.

    One group, and the table stays where it is, as long as each device has LANES.

    Returns: None on one device.
    """
    if mesh is None or mesh.size == 1:
        return None
    sizes = [k for k in _divisors(mesh) if not features % k]
    wide = [k for k in sizes if features // k >= LANES]
    return _groups_of(mesh, (wide if features >= LANES else sizes)[-1])


def _divisors(mesh: Mesh | AbstractMesh) -> list[int]:
    most = mesh.shape["fsdp"] * mesh.shape["context"]
    return [k for k in range(1, most + 1) if most % k == 0]


def _groups_of(mesh: Mesh, members: int) -> Groups:
    data, tensor = mesh.shape["data"], mesh.shape["tensor"]
    shape = data, mesh.size // (data * members * tensor), members, tensor
    names = "data", "groups", "members", "tensor"
    types = (mesh.axis_types[0],) * len(shape)
    return Groups(Mesh(mesh.devices.reshape(shape), names, axis_types=types))
