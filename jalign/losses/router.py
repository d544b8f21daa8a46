"""What keeps the experts of a mixture equally busy."""

import jax
import jax.numpy as jnp


def load_balancing_loss(load: jax.Array, probability: jax.Array) -> jax.Array:
    """E sum_e load_e probability_e: k where all experts are equally busy.

    Args:
      load: float32 [E], assignments to each expert over tokens; they sum to k.
      probability: float32 [E], the router's, the mean over the same tokens.

    Returns: float32 [], differentiable in `probability`.
    Source: Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6; over the tokens of all
      layers together, as transformers has it.
    """
    return load.shape[-1] * jnp.sum(jax.lax.stop_gradient(load) * probability)
