"""What the logits losses ask of a mesh, without knowing one; and the one device."""

from collections.abc import Callable
from typing import Protocol

import jax

from jalign.losses.checks import PyTree

Local = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class Layout(Protocol):
    """How rows and vocabulary lie on a mesh; hashable. See sharding/groups.py."""

    @property
    def groups(self) -> int:
        """Into how many parts the rows of the batch are cut."""
        ...

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """x, cut along its leading axes: "row", "vocab", or None for a whole one."""
        ...

    def run(
        self, local: Local, by_rows: PyTree, weights: PyTree
    ) -> tuple[PyTree, PyTree]:
        """`local(rows, weights) -> (rows, sums)` of each group, put together.

        Rows [B, ...] in and out; sums over a group's rows are added up.
        """
        ...


class OneDevice:
    """All as it comes: on one device, and on a mesh that jax is left alone with."""

    groups = 1

    def place(self, x: jax.Array, *axes: str | None) -> jax.Array:
        del axes
        return x

    def run(
        self, local: Local, by_rows: PyTree, weights: PyTree
    ) -> tuple[PyTree, PyTree]:
        return local(by_rows, weights)


ONE_DEVICE = OneDevice()
