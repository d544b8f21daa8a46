"""Reward models from pairs (Bradley–Terry)."""

import jax
import jax.numpy as jnp

from jalign.losses.elementwise import Array, Scalar, check_float32, elementwise


@elementwise(rank=1)
def bradley_terry_loss(
    chosen_rewards: Array,
    rejected_rewards: Array,
    *,
    margin: Scalar | Array = 0.0,
) -> jax.Array:
    """-log σ(r_chosen - r_rejected - margin), one per pair.

    Args:
      chosen_rewards, rejected_rewards: float32 [B], the model's scores.
      margin: scalar or float32 [B], by how much the chosen one should at least win.

    Returns: float32 [B], nats; log 2 at equal rewards without margin. Not reduced.
    Raises: AssertionError at trace time unless the arrays are float32 [B].
    Source: Ouyang et al. 2022, eq. 1 (arXiv:2203.02155); margin: Touvron et al. 2023,
      eq. 2 (arXiv:2307.09288).
    """
    if jnp.ndim(margin):
        check_float32([chosen_rewards, margin], rank=1)  # pyright: ignore[reportArgumentType]
    return -jax.nn.log_sigmoid(chosen_rewards - rejected_rewards - margin)


@elementwise(rank=1)
def reward_center_loss(chosen_rewards: Array, rejected_rewards: Array) -> jax.Array:
    """(r_chosen + r_rejected)², which holds the scores of a prompt around 0.

    Bradley–Terry leaves each prompt's offset free. Add it with a small weight (0.01).

    Args:
      chosen_rewards, rejected_rewards: float32 [B].

    Returns: float32 [B]. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Eisenstein et al. 2023, §3.2 (arXiv:2312.09244).
    """
    return jnp.square(chosen_rewards + rejected_rewards)
