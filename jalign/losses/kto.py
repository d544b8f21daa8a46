"""Single completions, each good or bad: Kahneman–Tversky optimization (KTO), and binary
classifier optimization (BCO) with its running shift.
"""

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, elementwise
from jalign.losses.reduce import masked_mean, token_mean


@elementwise(rank=1, bools=("desirable",))
def kto_loss(
    logps: Array,
    ref_logps: Array,
    desirable: Array,
    *,
    beta: Scalar,
    kl: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> jax.Array:
    """λ_D [1 - σ(β(ρ - z))] if desirable, else λ_U [1 - σ(β(z - ρ))], ρ = log π/π_ref.

    With kl = 0 it is APO-zero for single completions (TRL's apo_zero_unpaired).

    Args:
      logps: float32 [B], log π(y|x) in nats, summed over completion tokens.
      ref_logps: float32 [B], the same under π_ref; no gradient flows.
      desirable: bool [B], True for a good completion.
      beta: β > 0.
      kl: z >= 0, scalar, from `kto_kl`; no gradient flows.
      desirable_weight, undesirable_weight: λ_D, λ_U > 0; advised is
        λ_D n_D / (λ_U n_U) between 1 and 4/3, n their numbers in the data.

    Returns: float32 [B], between 0 and λ. Not reduced.
    Raises: AssertionError at trace time unless arrays are float32 and bool [B].
    Source: Ethayarajh et al. 2024, eq. 7 (arXiv:2402.01306).
    """
    gain = beta * (logps - jax.lax.stop_gradient(ref_logps) - jax.lax.stop_gradient(kl))
    good = desirable_weight * jax.nn.sigmoid(-gain)
    return jnp.where(desirable, good, undesirable_weight * jax.nn.sigmoid(gain))


def kto_kl(logps: Array, ref_logps: Array, mask: Array) -> jax.Array:
    """max(0, mean of log π(y'|x)/π_ref(y'|x)) over the batch: KTO's z, its zero point.

    y' is a completion of *another* prompt, such as the next row's (y rotated by one):
    of random pairs it is an estimate of KL(π‖π_ref). The mean is over all counted rows
    of the global batch: take it before the batch is cut into micro-batches.

    Args:
      logps: float32 [B], log π(y'|x) in nats, summed over completion tokens.
      ref_logps: float32 [B], the same under π_ref.
      mask: bool [B], True for the rows that count; the rest may hold anything.

    Returns: float32 [], nats, at least 0; 0 if nothing counts. No gradient flows.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Ethayarajh et al. 2024 (arXiv:2402.01306).
    """
    check_float32([logps, ref_logps], rank=1)
    mean = masked_mean(logps - ref_logps, mask)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


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
