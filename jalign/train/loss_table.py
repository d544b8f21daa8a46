"""One table for the command line: a trainer's losses by name, and what each reads.

`REGISTRY[command][name]` is an Entry; `jalign COMMAND --loss` sums them. What is not
here needs more than the command has (KTO: completions of other prompts; BCO: a running
state) and is called as a function.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from jalign.losses import (
    aot,
    dpo,
    policy,
    ppo,
    preference,
    reduce,
    reference_free,
    reward,
    sequence_policy,
    sft,
)
from jalign.losses.checks import Array, Scalar
from jalign.losses.group_advantages import (
    group_advantages,
    leave_one_out_advantages,
    optimal_baseline_advantages,
)
from jalign.losses.logps import sequence_logps

OF_GROUPS = ("rewards", "group_ids", "mask")
"""What advantages read that compare the completions of a prompt, [B] each."""


class Entry(NamedTuple):
    """A loss with the names of the arrays that it takes.

    Attributes:
      function: arrays in their order -> unreduced loss; scalars by keyword.
      inputs: names of the arrays.
      keywords: names of arrays that the function takes by keyword.
      defaults: scalars that the function itself leaves to the caller.
      whole_batch: it sorts or compares the rows of the whole batch, so that a
        micro-batch has another loss.
      bounds: of an option, where they are not those of BOUNDS.
      advantages: of a policy loss, a completion's advantage, float32 [B].
      advantage_inputs: names of its arrays: those of OF_GROUPS, or for one that reads
        lengths "completion_mask", bool [B, T].
      reduction: of a policy loss, (loss [B, T], mask) -> (sum, count), for some also
        with a `length`.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    defaults: Mapping[str, float] = {}
    whole_batch: bool = False
    bounds: Mapping[str, tuple[str, ...]] = {}
    advantages: Callable[..., Any] | None = None
    advantage_inputs: tuple[str, ...] = OF_GROUPS
    reduction: Callable[..., Any] | None = None


def _negative(logps: Array) -> Array:
    """-log p."""
    return -logps


_PAIR = ("chosen_logps", "rejected_logps")
_REFS = ("ref_chosen_logps", "ref_rejected_logps")
_AVERAGE_PAIR = tuple(f"average_{name}" for name in _PAIR)
_AVERAGE_REFS = tuple(f"average_{name}" for name in _REFS)
_BETA = {"beta": 0.1}


def _with_reference(function, **defaults: float) -> Entry:
    return Entry(function, _PAIR + _REFS, defaults=_BETA | defaults)


def _of_whole_batch(function) -> Entry:
    inputs = (*_PAIR, *_REFS, "mask")
    return Entry(function, inputs, defaults=_BETA, whole_batch=True)


_SFT = {
    "sft": Entry(
        sft.cross_entropy,
        ("logits", "targets"),
        bounds={"label_smoothing": (">= 0", "< 1")},
    ),
    "dft": Entry(sft.dft_loss, ("logps",)),
}
_REWARD = {
    "bradley_terry": Entry(
        reward.bradley_terry_loss,
        ("chosen_rewards", "rejected_rewards"),
        keywords=("margin",),
    ),
    "center": Entry(reward.reward_center_loss, ("chosen_rewards", "rejected_rewards")),
}
_PREFERENCE = {
    "sft": Entry(_negative, ("average_chosen_logps",)),
    "dpo": _with_reference(dpo.dpo_loss),
    "sigmoid_norm": Entry(dpo.dpo_loss, _AVERAGE_PAIR + _AVERAGE_REFS, defaults=_BETA),
    "ipo": Entry(preference.ipo_loss, _AVERAGE_PAIR + _AVERAGE_REFS, defaults=_BETA),
    "ipo_sum": _with_reference(preference.ipo_loss),
    "hinge": _with_reference(preference.hinge_loss),
    "robust": _with_reference(preference.robust_dpo_loss, label_smoothing=0.0),
    "exo_pair": _with_reference(preference.exo_pair_loss)._replace(
        bounds={"label_smoothing": ("> 0", "< 0.5")}
    ),
    "discopop": _with_reference(preference.discopop_loss),
    "nca_pair": _with_reference(preference.nca_pair_loss),
    "bco_pair": _with_reference(preference.bco_pair_loss),
    "sppo_hard": _with_reference(preference.sppo_hard_loss),
    "dpop": _with_reference(preference.dpop_loss),
    "apo_zero": _with_reference(preference.apo_zero_loss),
    "apo_down": _with_reference(preference.apo_down_loss),
    "aot": _of_whole_batch(aot.aot_loss),
    "aot_unpaired": _of_whole_batch(aot.aot_unpaired_loss),
    "cpo": Entry(reference_free.cpo_loss, _PAIR, defaults=_BETA),
    "simpo": Entry(reference_free.simpo_loss, _AVERAGE_PAIR, defaults={"beta": 2.0}),
    "alphapo": Entry(
        reference_free.alphapo_loss, _AVERAGE_PAIR, defaults={"beta": 2.0}
    ),
    "orpo": Entry(reference_free.orpo_loss, _AVERAGE_PAIR),
}
_SCALED = group_advantages
_CENTERED = functools.partial(_SCALED, scale_by_std=False)
_TOKEN = ("logps", "old_logps", "advantages")
_SEQUENCE = (*_TOKEN, "mask")
_CLIP = {"clip_eps": 0.2}
_GSPO_CLIP = {"clip_eps": 3e-4, "clip_eps_high": 4e-4}  # of the paper


def _rloo(
    logps: Array,
    old_logps: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_eps: Scalar,
    clip_eps_high: Scalar | None = None,
) -> Array:
    """rloo_loss of each completion, at each of its tokens, for sequence_mean."""
    sums = sequence_logps(logps, mask), sequence_logps(old_logps, mask)
    total = jnp.sum(jnp.where(mask, advantages, 0.0), axis=1)
    advantage = total / jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)
    loss = policy.rloo_loss(
        *sums, advantage, clip_eps=clip_eps, clip_eps_high=clip_eps_high
    )
    return jnp.where(mask, loss[:, None], 0.0)


def _policy(function, inputs, reduction, advantages=_SCALED, **defaults) -> Entry:
    how = {"advantages": advantages, "reduction": reduction}
    return Entry(function, inputs, defaults=defaults, **how)


_clipped = functools.partial(_policy, ppo.ppo_policy_loss, _TOKEN, **_CLIP)
_gspo = functools.partial(_policy, sequence_policy.gspo_loss, _SEQUENCE, **_GSPO_CLIP)
_reinforce = functools.partial(
    _policy, policy.reinforce_loss, ("logps", "advantages"), reduce.token_mean
)
_GROUP = {
    "grpo": _clipped(reduce.sequence_mean),
    "dr_grpo": _clipped(reduce.fixed_length_mean, _CENTERED),
    "dapo": _clipped(reduce.token_mean),
    "bnpo": _clipped(reduce.token_mean),
    "gspo": _gspo(reduce.sequence_mean),
    "luspo": _gspo(reduce.sequence_sum_mean),
    "gmpo": _policy(
        sequence_policy.gmpo_loss, _SEQUENCE, reduce.sequence_mean
    )._replace(bounds={"clip_eps": ("> 0",)}),  # of the logarithm
    "cispo": _policy(policy.cispo_loss, _TOKEN, reduce.token_mean, max_ratio=5.0),
    "sapo": _policy(policy.sapo_loss, _TOKEN, reduce.sequence_mean),
    "vespo": _policy(sequence_policy.vespo_loss, _SEQUENCE, reduce.token_mean),
    "rloo": _policy(
        _rloo, _SEQUENCE, reduce.sequence_mean, leave_one_out_advantages, **_CLIP
    ),
    "reinforce": _reinforce(),
    "opo": _reinforce(optimal_baseline_advantages)._replace(
        advantage_inputs=("rewards", "group_ids", "completion_mask")
    ),
}
REGISTRY: Mapping[str, Mapping[str, Entry]] = {
    "sft": _SFT,
    "reward": _REWARD,
    "dpo": _PREFERENCE,
    "grpo": _GROUP,
}
"""Command -> name -> Entry."""
BOUNDS: Mapping[str, tuple[str, ...]] = {
    "alpha": (),  # any number
    "beta": ("> 0",),
    "clip_eps": ("> 0", "< 1"),  # ratios are positive
    "clip_eps_high": ("> 0",),
    "dual_clip": ("> 1",),
    "gamma": (">= 0",),
    "k_neg": ("> 0",),
    "k_pos": ("> 0",),
    "label_smoothing": (">= 0", "< 0.5"),
    "lambda_neg": ("> 0",),
    "lambda_pos": ("> 0",),
    "max_ratio": (">= 1",),
    "min_ratio": (">= 0", "<= 1"),
    "penalty": (">= 0",),
    "shift": (),
    "tau": ("> 0", "< 1"),
    "temperature_neg": ("> 0",),
    "temperature_pos": ("> 0",),
    "z_loss": (">= 0",),
}
"""Option of a loss -> its bounds, as `settings.number` takes them."""
