"""A reference that follows the policy (TR-DPO)."""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.elementwise import PyTree, Scalar


def moving_reference(
    ref_params: PyTree, params: PyTree, *, alpha: Scalar = 0.6
) -> PyTree:
    """α π + (1-α) π_ref, leaf by leaf: TR-DPO's update of the reference.

    Soft: every step with a small α. Hard: α = 1, every few hundred steps. TRL's default
    is 0.6 every 512 steps: `jax.lax.cond(step % 512 == 0, ...)`.

    Args:
      ref_params: tree of float arrays, π_ref's parameters.
      params: the same tree and shapes, π's parameters.
      alpha: α in [0, 1].

    Returns: the tree of ref_params with its dtypes; the sum is taken in float32. No
      gradient flows.
    Raises: AssertionError at trace time on another structure, shape or an int leaf.
    Source: Gorbatovski et al. 2024 (arXiv:2404.09656).
    """
    chex.assert_trees_all_equal_shapes(ref_params, params)
    chex.assert_type(jax.tree.leaves((ref_params, params)), float)

    def mix(ref, new):
        ref32, new32 = jnp.asarray(ref, jnp.float32), jnp.asarray(new, jnp.float32)
        # Both weights, not ref + α (new - ref): at α = 1 it is new exactly.
        return (alpha * new32 + (1 - alpha) * ref32).astype(ref.dtype)

    return jax.lax.stop_gradient(jax.tree.map(mix, ref_params, params))
