"""Direct preference optimization (DPO)."""

import jax

from jalign.losses.elementwise import Array, Scalar, elementwise


@elementwise(rank=1)
def dpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """-(1-ε) log σ(z) - ε log σ(-z), one per pair, where
    z = β [log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)].

    Args:
      chosen_logps: float32 [B], log π(y_w|x) in nats, summed over completion tokens.
      rejected_logps: float32 [B], the same for the rejected completion y_l.
      ref_chosen_logps, ref_rejected_logps: the same under π_ref; no gradient flows.
      beta: β > 0, how tightly π is held to π_ref.
      label_smoothing: ε in [0, 0.5), probability that a pair is labelled backwards.

    Returns: float32 [B], nats; log 2 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all four are float32 [B].
    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); ε: ericmitchell.ai/cdpo.pdf.
    """
    # Ratios first: π ≈ π_ref, so this difference of large sums is nearly exact.
    chosen_logratio = chosen_logps - jax.lax.stop_gradient(ref_chosen_logps)
    rejected_logratio = rejected_logps - jax.lax.stop_gradient(ref_rejected_logps)
    z, eps = beta * (chosen_logratio - rejected_logratio), label_smoothing
    return -(1 - eps) * jax.nn.log_sigmoid(z) - eps * jax.nn.log_sigmoid(-z)


@elementwise(rank=1)
def implicit_rewards(logps: Array, ref_logps: Array, *, beta: Scalar) -> jax.Array:
    """β log π(y)/π_ref(y), the reward that a DPO policy stands for; a metric.

    Args:
      logps, ref_logps: float32 [B], nats, summed over completion tokens.
      beta: β > 0 of the loss.

    Returns: float32 [B], up to a constant of each prompt. No gradient flows.
    Raises: AssertionError at trace time unless both are float32 [B].
    Source: Rafailov et al. 2023, eq. 5 (arXiv:2305.18290).
    """
    return jax.lax.stop_gradient(beta * (logps - ref_logps))
