"""What keeps the experts of a mixture equally busy."""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, check_float32


def load_balancing_loss(load: Array, probability: Array) -> jax.Array:
    """E sum_e load_e probability_e: k where all experts are equally busy.

    Args:
      load: float32 [E], assignments to each expert over tokens; they sum to k.
      probability: float32 [E], the router's, the mean over the same tokens.

    Returns: float32 []. No gradient flows to `load`.
    Raises: AssertionError at trace time unless both are float32 [E].
    Source: Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6; over the tokens of all
      layers together, as transformers has it.
    """
    check_float32([load, probability], rank=1)
    return load.size * jnp.sum(jax.lax.stop_gradient(load) * probability)
