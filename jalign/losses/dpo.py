"""Direct preference optimization (DPO)."""

import chex
import jax

from jalign.losses.elementwise import Array, Scalar, elementwise


@elementwise(rank=1)
def dpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
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
        Both None: no reference. The first two may then be any score of a completion:
        its log π(y|x) (reference-free DPO), or an f-divergence's score of its
        log-ratio (`js_score` and others).
      beta: β > 0, how tightly π is held to π_ref.
      label_smoothing: ε in [0, 0.5), probability that a pair is labelled backwards.

    Returns: float32 [B], nats; log 2 where π = π_ref. Not reduced.
    Raises: AssertionError at trace time unless all are float32 [B], or one reference
      alone is None.
    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); ε: ericmitchell.ai/cdpo.pdf.
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


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


def log_ratios(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array | None,
    ref_rejected_logps: Array | None,
) -> tuple[jax.Array, jax.Array]:
    """log π/π_ref of both completions, [B] each; no gradient to π_ref.

    Ratios first: π ≈ π_ref, so the difference of large sums is nearly exact, while
    chosen minus rejected before it would round.
    """
    if ref_chosen_logps is None or ref_rejected_logps is None:
        chex.assert_equal(ref_chosen_logps, ref_rejected_logps)  # not one alone
        return chosen_logps, rejected_logps
    ref_chosen, ref_rejected = jax.lax.stop_gradient(
        (ref_chosen_logps, ref_rejected_logps)
    )
    return chosen_logps - ref_chosen, rejected_logps - ref_rejected


def smoothed_logistic(z: jax.Array, label_smoothing: Scalar) -> jax.Array:
    """-(1-ε) log σ(z) - ε log σ(-z)."""
    eps = label_smoothing
    return -(1 - eps) * jax.nn.log_sigmoid(z) - eps * jax.nn.log_sigmoid(-z)
