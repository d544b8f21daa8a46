"""Alignment by optimal transport (AOT): quantiles against quantiles over the batch.

The batch is sorted as a whole, whatever its sharding. Sort before it is cut into
micro-batches: the loss of a part is not a part of the loss.
"""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, check_float32, check_mask
from jalign.losses.dpo import log_ratios, smoothed_logistic
from jalign.losses.group_advantages import everywhere


def aot_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    mask: Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """DPO's loss of δ_(k) = (k-th of log π(y_w)/π(y_l)) - (k-th of the same of π_ref).

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss.
      mask: bool [B], True for the pairs that count; the others take no part.
      beta: β > 0.
      label_smoothing: ε in [0, 0.5).

    Returns: float32 [B], nats: in row i the loss of the quantile at which π's margin of
      pair i lies; 0 where not counted. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Melnyk et al. 2024 (arXiv:2406.05882), paired.
    """
    logps = [chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps]
    check_float32(logps, rank=1)
    check_mask(mask, chosen_logps)
    chosen, rejected, ref_chosen, ref_rejected = _cleaned(logps, mask)
    ref = jax.lax.stop_gradient(ref_chosen - ref_rejected)
    delta = _minus_same_quantile(chosen - rejected, ref, mask)
    return jnp.where(mask, smoothed_logistic(beta * delta, label_smoothing), 0.0)


def aot_unpaired_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    mask: Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """DPO's loss of δ_(k) = (k-th of the chosen log π/π_ref) - (k-th of the rejected).

    Rows need not be pairs, only as many chosen as rejected ones.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss.
      mask: bool [B], True for the rows that count; the others take no part.
      beta: β > 0.
      label_smoothing: ε in [0, 0.5).

    Returns: float32 [B], nats: in row i the loss of the quantile at which chosen row i
      lies; 0 where not counted. Not reduced.
    Raises: AssertionError at trace time on wrong rank, shape or dtype.
    Source: Melnyk et al. 2024 (arXiv:2406.05882), unpaired.
    """
    logps = [chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps]
    check_float32(logps, rank=1)
    check_mask(mask, chosen_logps)
    chosen, rejected = log_ratios(*_cleaned(logps, mask))
    delta = _minus_same_quantile(chosen, rejected, mask)
    return jnp.where(mask, smoothed_logistic(beta * delta, label_smoothing), 0.0)


def _cleaned(arrays: list, mask: Array) -> list[jax.Array]:
    return [jnp.where(mask, x, 0.0) for x in arrays]


def _minus_same_quantile(x: jax.Array, y: jax.Array, mask: Array) -> jax.Array:
    """x_i minus the counted y of the same rank as x_i among the counted x."""
    # What is sorted must not be split over devices.
    ends = [everywhere(jnp.where(mask, z, jnp.inf)) for z in (x, y)]
    order_x, order_y = map(jnp.argsort, ends)
    rank = jnp.argsort(order_x)  # the inverse permutation
    return x - everywhere(y)[order_y[rank]]
