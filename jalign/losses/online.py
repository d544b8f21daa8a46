"""Preference losses on samples drawn while training: XPO, Nash-MD.

Online DPO needs no loss of its own: it is dpo_loss of two samples of π that a judge has
ranked (docs/papers.md).
"""

import jax

from jalign.losses.dpo import log_ratios, smoothed_logistic
from jalign.losses.elementwise import Array, Scalar, elementwise


@elementwise(rank=1)
def xpo_loss(
    chosen_logps: Array,
    rejected_logps: Array,
    ref_chosen_logps: Array,
    ref_rejected_logps: Array,
    explore_logps: Array,
    *,
    beta: Scalar,
    alpha: Scalar = 1e-5,
) -> jax.Array:
    """dpo_loss + α log π(ỹ), one per prompt: optimism by unlearning the reference.

    Of the two ranked completions one is a sample of π, the other one ỹ, of π_ref.

    Args:
      chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps: float32 [B],
        as in dpo_loss.
      explore_logps: float32 [B], log π(ỹ|x) in nats of the sample of π_ref: whichever
        of the first two arrays it is in.
      beta: β > 0.
      alpha: α >= 0, weight of the exploration; 0 is online DPO.

    Returns: float32 [B], nats. Not reduced.
    Raises: AssertionError at trace time unless all five are float32 [B].
    Source: Xie et al. 2024, algorithm 1 (arXiv:2405.21046).
    """
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = smoothed_logistic(beta * (chosen - rejected), 0.0)
    return loss + alpha * explore_logps


@elementwise(rank=1)
def nash_md_loss(
    logps: Array, ref_logps: Array, win_probs: Array, *, beta: Scalar
) -> jax.Array:
    """-[P - ½ - β log π(y)/π_ref(y)] log π(y), the bracket without gradient.

    Its gradient is REINFORCE's for winning against the mixture, less β KL(π‖π_ref);
    its value means nothing.

    Args:
      logps: float32 [B], log π(y|x) in nats, summed over the tokens of a sample y ~ π.
      ref_logps: float32 [B], the same under π_ref; no gradient flows.
      win_probs: float32 [B], P(y beats y'), y' a sample of the geometric mixture
        π^(1-κ) π_ref^κ; no gradient flows.
      beta: β >= 0, the paper's τ.

    Returns: float32 [B]. Not reduced.
    Raises: AssertionError at trace time unless all three are float32 [B].
    Source: Munos et al. 2023 (arXiv:2312.00886).
    """
    advantage = win_probs - 0.5 - beta * (logps - ref_logps)
    return -jax.lax.stop_gradient(advantage) * logps
