"""Binary classifier optimization (BCO): single completions, with a running shift."""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.elementwise import (
    Array,
    Scalar,
    check_float32,
    elementwise,
)
from jalign.losses.reduce import token_mean

MAX_COUNT = 2.0**24
"""Where float32 stops counting by ones; the running mean forgets from there on."""


@elementwise(rank=1, bools=("desirable",))
def bco_loss(
    logps: Array,
    ref_logps: Array,
    desirable: Array,
    *,
    beta: Scalar,
    shift: Scalar,
) -> jax.Array:
    """-log σ(βρ - δ) if desirable, else -log σ(-(βρ - δ)), ρ = log π/π_ref.

    Args:
      logps: float32 [B], log π(y|x) in nats, summed over completion tokens.
      ref_logps: float32 [B], the same under π_ref; no gradient flows.
      desirable: bool [B], True for a good completion.
      beta: β > 0.
      shift: δ, scalar, the mean reward βρ so far (`bco_shift_update`); no gradient
        flows.

    Returns: float32 [B], nats. Not reduced. Weights that match the prompts of the bad
      completions to those of the good ones (UDM) are a factor on it.
    Raises: AssertionError at trace time unless arrays are float32 and bool [B].
    Source: Jung et al. 2024 (arXiv:2404.04656).
    """
    rewards = beta * (logps - jax.lax.stop_gradient(ref_logps))
    z = rewards - jax.lax.stop_gradient(shift)
    return -jax.nn.log_sigmoid(jnp.where(desirable, z, -z))


def bco_shift_update(
    shift: Scalar, count: Scalar, rewards: Array, mask: Array
) -> tuple[jax.Array, jax.Array]:
    """The mean of all rewards seen, with those of this batch: δ + (Σ r - n δ)/(N + n).

    Start from (0.0, 0.0); update with a batch before its loss. Rewards are
    `implicit_rewards` of good and bad completions alike, of the global batch.

    Args:
      shift: δ, scalar, the mean so far.
      count: N, scalar, number of rewards in it.
      rewards: float32 [B], β log π/π_ref.
      mask: bool [B], True for the rows that count; the rest may hold anything.

    Returns: (shift, count), float32 [] each, the count at most 2²⁴. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Jung et al. 2024 (arXiv:2404.04656), over all rewards as in TRL.
    """
    chex.assert_rank([shift, count], 0)
    check_float32([rewards], rank=1)
    shift, count = jnp.asarray(shift, jnp.float32), jnp.asarray(count, jnp.float32)
    # Differences first: the sum of many equal rewards must not move their mean.
    moved, n = token_mean(rewards - shift, mask)
    new_count = jnp.minimum(count + n, MAX_COUNT)
    new_shift = shift + moved / jnp.maximum(new_count, 1.0)
    return jax.lax.stop_gradient((new_shift, new_count))
