"""How far two computations of one float32 number may be apart, whatever the machine."""

import jax
import numpy as np

EPS = float(np.finfo(np.float32).eps)


def float32_sum(n: int, size: float = 1.0) -> float:
    """The bound for two orders of a float32 sum of n terms: n * eps * size.

    Size is the sum of the terms' magnitudes, not of the terms: what cancels has left
    its rounding behind. A term that is itself a sum adds its own number of terms to n
    (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2; each
    order is within (n - 1) * eps / 2 * size of the exact sum).
    """
    return n * EPS * size


def assert_trees_close(got, want, *, n: int) -> None:
    """Leaf by leaf: no entry is off by more than float32_sum(n, largest entry)."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        bound = float32_sum(n, float(np.abs(x).max()))
        np.testing.assert_allclose(
            y, x, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path)
        )
