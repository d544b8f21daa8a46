"""One table for the command line: a trainer's losses by name, and what each reads.

`REGISTRY[command][name]` is an Entry; `jalign COMMAND --loss` sums them. What is not
here needs more than the command has (KTO: completions of other prompts; BCO: a running
state) and is called as a function.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jalign.losses import (
    anchored,
    aot,
    dpo,
    preference,
    reference_free,
    reward,
    sft,
)
from jalign.losses.elementwise import Array


class Entry(NamedTuple):
    """A loss with the names of the arrays that it takes.

    Attributes:
      function: arrays in their order -> unreduced loss; scalars by keyword.
      inputs: names of the arrays.
      keywords: names of arrays that the function takes by keyword.
      defaults: scalars that the function itself leaves to the caller.
      whole_batch: it sorts or compares the rows of the whole batch, so that a
        micro-batch has another loss.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    defaults: Mapping[str, float] = {}
    whole_batch: bool = False


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


_SFT = {
    "sft": Entry(sft.cross_entropy, ("logits", "targets")),
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
    "exo_pair": _with_reference(preference.exo_pair_loss),
    "discopop": _with_reference(preference.discopop_loss),
    "nca_pair": _with_reference(anchored.nca_pair_loss),
    "bco_pair": _with_reference(anchored.bco_pair_loss),
    "sppo_hard": _with_reference(anchored.sppo_hard_loss),
    "apo_zero": _with_reference(anchored.apo_zero_loss),
    "apo_down": _with_reference(anchored.apo_down_loss),
    "aot": Entry(
        aot.aot_loss, (*_PAIR, *_REFS, "mask"), defaults=_BETA, whole_batch=True
    ),
    "aot_unpaired": Entry(
        aot.aot_unpaired_loss,
        (*_PAIR, *_REFS, "mask"),
        defaults=_BETA,
        whole_batch=True,
    ),
    "cpo": Entry(reference_free.cpo_loss, _PAIR, defaults=_BETA),
    "simpo": Entry(reference_free.simpo_loss, _AVERAGE_PAIR, defaults={"beta": 2.0}),
    "alphapo": Entry(
        reference_free.alphapo_loss, _AVERAGE_PAIR, defaults={"beta": 2.0}
    ),
    "orpo": Entry(reference_free.orpo_loss, _AVERAGE_PAIR),
}
REGISTRY: Mapping[str, Mapping[str, Entry]] = {
    "sft": _SFT,
    "reward": _REWARD,
    "dpo": _PREFERENCE,
}
"""Command -> name -> Entry."""
