"""Direct preference optimization (DPO), what makes a formula a loss of pairs, and a
reference that follows the policy (TR-DPO).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol

import chex
import jax
import jax.numpy as jnp

from jalign.losses.checks import Array, PyTree, Scalar, elementwise

P = ParamSpec("P")
_NAMES = "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"
_ARGS = """Args:
      chosen_logps: float32 [B], log π(y_w|x) in nats, summed over completion tokens.
      rejected_logps: float32 [B], the same for the rejected completion y_l.
      ref_chosen_logps, ref_rejected_logps: the same under π_ref; no gradient flows.
        Both None: no reference. The first two may then be any score of a completion:
        its log π(y|x) (reference-free), its average over the tokens, or an
        f-divergence's score of its log-ratio (`js_score` and others).
"""
_RAISES = """Raises: AssertionError at trace time unless all are float32 [B], or one
      reference alone is None.
    Source:"""


class PairLoss(Protocol[P]):
    """A loss of two completions' log-probabilities, [B] each, to float32 [B]."""

    def __call__(
        self,
        chosen_logps: Array,
        rejected_logps: Array,
        ref_chosen_logps: Array | None,
        ref_rejected_logps: Array | None,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> jax.Array: ...


def paired(formula: Callable[Concatenate[Array, Array, P], jax.Array]) -> PairLoss[P]:
    """Makes a formula of two log-ratios a loss of the log-probabilities.

    Args:
      formula: (ρ_w, ρ_l, *, scalars) -> float32 [B], with ρ = log π/π_ref, or any score
        where there is no reference.

    Returns: the loss, called as `dpo_loss` is and checked as `elementwise` does; the
      formula's docstring is completed by the arrays and errors, which are the same for
      all.
    """

    def loss(
        chosen: Array,
        rejected: Array,
        ref_chosen: Array | None,
        ref_rejected: Array | None,
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> jax.Array:
        ratios = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
        return formula(*ratios, *args, **kwargs)

    functools.update_wrapper(loss, formula)
    taken = inspect.signature(formula)
    arrays = [
        inspect.Parameter(
            name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind
        )
        for name, kind in zip(_NAMES, 2 * [Array] + 2 * [Array | None], strict=True)
    ]
    scalars = list(taken.parameters.values())[2:]
    loss.__signature__ = taken.replace(parameters=arrays + scalars)  # type: ignore
    if formula.__doc__:  # none under python -OO
        text = formula.__doc__.replace("Args:\n", _ARGS, 1)
        loss.__doc__ = text.replace("Source:", _RAISES, 1)
    return elementwise(rank=1)(loss)


@paired
def dpo_loss(
    chosen: Array, rejected: Array, *, beta: Scalar, label_smoothing: Scalar = 0.0
) -> jax.Array:
    """-(1-ε) log σ(z) - ε log σ(-z), one per pair, where
    z = β [log π(y_w)/π_ref(y_w) - log π(y_l)/π_ref(y_l)].

    Args:
      beta: β > 0, how tightly π is held to π_ref.
      label_smoothing: ε in [0, 0.5), probability that a pair is labelled backwards.

    Returns: float32 [B], nats; log 2 where π = π_ref. Not reduced.
    Source: Rafailov et al. 2023, eq. 7 (arXiv:2305.18290); ε: ericmitchell.ai/cdpo.pdf.
    """
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


def moving_reference(
    ref_params: PyTree, params: PyTree, *, alpha: Scalar = 0.6
) -> PyTree:
    """α π + (1-α) π_ref, leaf by leaf: TR-DPO's update of the reference.

    Soft: every step with a small α. Hard: α = 1, every few hundred steps. TRL's default
    is 0.6 every 512 steps: `jax.lax.cond(step % 512 == 0, ...)`.

    Args:
      ref_params: tree of float arrays, π_ref's parameters.
      params: the same tree and shapes, π's parameters.
      alpha: α in [0, 1].

    Returns: the tree of ref_params with its dtypes; the sum is taken in float32. No
      gradient flows.
    Raises: AssertionError at trace time on another structure, shape or an int leaf.
    Source: Gorbatovski et al. 2024 (arXiv:2404.09656).
    """
    chex.assert_trees_all_equal_shapes(ref_params, params)
    chex.assert_type(jax.tree.leaves((ref_params, params)), float)

    def mix(ref, new):
        ref32, new32 = jnp.asarray(ref, jnp.float32), jnp.asarray(new, jnp.float32)
        # Both weights, not ref + α (new - ref): at α = 1 it is new exactly.
        return (alpha * new32 + (1 - alpha) * ref32).astype(ref.dtype)

    return jax.lax.stop_gradient(jax.tree.map(mix, ref_params, params))
