"""Policy losses beside PPO's: of each token (REINFORCE, CISPO, SAPO, APA), of a whole
completion as one action (RLOO), and against another policy's samples (Nash-MD).
"""

import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, Scalar, elementwise
from jalign.losses.ppo import clipped_objective
from jalign.losses.ratios import clamped_ratio


@elementwise(rank=2)
def reinforce_loss(logps: Array, advantages: Array) -> jax.Array:
    """-A log π, whose gradient is that of the expected reward for tokens from π itself.

    Args:
      logps: float32 [B, T], nats.
      advantages: float32 [B, T]; no gradient flows.

    Returns: float32 [B, T]. Not reduced.
    Raises: AssertionError at trace time unless both are float32 [B, T].
    Source: Williams 1992 (Machine Learning 8); for language models Ahmadian et al.
      2024 (arXiv:2402.14740).
    """
    return -jax.lax.stop_gradient(advantages) * logps


@elementwise(rank=2)
def cispo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    max_ratio: Scalar,
    min_ratio: Scalar = 0.0,
) -> jax.Array:
    """-sg[clip(ρ, min, max)] A log π with ρ = π/π_old: REINFORCE with clipped weights.

    Unlike PPO's, a clipped token keeps its gradient. The bounds are those of ρ itself:
    1 - ε and 1 + ε_high of the paper; TRL's epsilon_high is `max_ratio`.

    Args:
      logps: float32 [B, T], nats.
      old_logps: float32 [B, T], the same at rollout time; no gradient flows.
      advantages: float32 [B, T]; no gradient flows.
      max_ratio: >= 1; ScaleRL (arXiv:2510.13786) uses 5.
      min_ratio: in [0, 1]; 0 is no bound, as in the paper's experiments.

    Returns: float32 [B, T]. Not reduced. log ρ is held to ±20.
    Raises: AssertionError at trace time unless all three are float32 [B, T].
    Source: MiniMax 2025, "MiniMax-M1" (arXiv:2506.13585).
    """
    ratio = jnp.clip(clamped_ratio(logps, old_logps), min_ratio, max_ratio)
    return -jax.lax.stop_gradient(ratio * advantages) * logps


@elementwise(rank=2)
def sapo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    temperature_pos: Scalar = 1.0,
    temperature_neg: Scalar = 1.05,
) -> jax.Array:
    """-(4/τ) σ(τ (ρ - 1)) A with ρ = π/π_old: a soft gate in place of PPO's clip.

    Args:
      logps: float32 [B, T], nats.
      old_logps: float32 [B, T], the same at rollout time; no gradient flows.
      advantages: float32 [B, T]; no gradient flows.
      temperature_pos: τ > 0 where A > 0.
      temperature_neg: τ > 0 where A <= 0; larger decays faster.

    Returns: float32 [B, T]; gradient that of -A ρ where π = π_old. Not reduced. log ρ
      is held to ±20.
    Raises: AssertionError at trace time unless all three are float32 [B, T].
    Source: Gao et al. 2025, "Soft Adaptive Policy Optimization" (arXiv:2511.20347).
    """
    advantages = jax.lax.stop_gradient(advantages)
    temperature = jnp.where(advantages > 0, temperature_pos, temperature_neg)
    ratio = clamped_ratio(logps, old_logps)
    gate = jax.nn.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature
    return -gate * advantages


@elementwise(rank=2)
def apa_loss(
    logps: Array,
    ref_logps: Array,
    advantages: Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """(log π - log π_ref - A/β)²: least squares towards the policy π_ref exp(A/β).

    Args:
      logps: float32 [B, T], nats.
      ref_logps: float32 [B, T], the same under the policy trained from (π_init of the
        paper); no gradient flows.
      advantages: float32 [B, T], of the policy that sampled; no gradient flows.
      beta: β > 0, how tightly π is held to π_ref (λ of the paper).

    Returns: float32 [B, T]. Not reduced.
    Raises: AssertionError at trace time unless all three are float32 [B, T].
    Source: Zhu et al. 2023, "Fine-Tuning Language Models with Advantage-Induced Policy
      Alignment" (arXiv:2306.02231).
    """
    ref_logps, advantages = jax.lax.stop_gradient((ref_logps, advantages))
    return jnp.square(logps - ref_logps - advantages / beta)


@elementwise(rank=1)
def rloo_loss(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> jax.Array:
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε_high) A), ρ = Π_t π/π_old, one per completion.

    The completion is a single action; its A is leave_one_out_advantages of the rewards
    less β times the summed kl_k1. On policy it is `reinforce_loss` in its gradient.

    Args:
      logps: float32 [B], nats, summed over completion tokens (sequence_logps).
      old_logps: float32 [B], the same at rollout time; no gradient flows.
      advantages: float32 [B]; no gradient flows.
      clip_eps: ε in (0, 1).
      clip_eps_high: ε_high; None means ε.

    Returns: float32 [B]; -A where π = π_old. Not reduced. log ρ is held to ±20.
    Raises: AssertionError at trace time unless all three are float32 [B].
    Source: Ahmadian et al. 2024, "Back to Basics" (arXiv:2402.14740), with PPO's clip
      as in TRL's RLOOTrainer.
    """
    advantages = jax.lax.stop_gradient(advantages)
    ratio = clamped_ratio(logps, old_logps)
    unclipped, clipped = clipped_objective(ratio, advantages, clip_eps, clip_eps_high)
    return -jnp.minimum(unclipped, clipped)


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
