"""How a loss is called in the property tests, told by the letters of its axes."""

from typing import Any, NamedTuple

import numpy as np

BOOLS = ("mask", "other_mask", "desirable")
SIZES = {"B": 8, "T": 4, "D": 3, "V": 5}

INTEGERS = {"targets": SIZES["V"], "group_ids": 3}
"""Arguments that are int32, and how many different values they have."""


class Case(NamedTuple):
    """A function with its arguments described by the letters of their axes.

    Attributes:
      args: name -> axes of each positional array. Those in BOOLS are bool, those in
        INTEGERS int32, all others are float32.
      out: axes of the output.
      grads: names through which gradients flow; through all other floats none does.
      scalars: keyword-only arguments.
      any_float: names that may be of any float dtype, not only float32.
      reads_mask: the function itself leaves masked entries out.
      pad: what may lie at masked places; NaN unless the mask comes only after a
        matrix product or a softmax.
    """

    args: dict[str, str]
    out: str
    grads: tuple[str, ...] = ()
    scalars: dict[str, Any] = {}
    any_float: tuple[str, ...] = ()
    reads_mask: bool = False
    pad: float = np.nan


def like(axes: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, axes)
