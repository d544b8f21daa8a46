"""What a tensor is: its parameter, its layout in a Hugging Face file, its kind.

A family (family.py) says only what its modules are called. Read by one interpreter in
both directions (hf_weights); the optimizer and the count of FLOPs read here too.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jalign.models.config import ModelConfig
from jalign.sharding.rules import axes_of, num_inputs

MATRICES = ("kernel", "embedding", "lora_a", "lora_b")  # what weight decay takes
MATRICES += ("weight", "gate", "up", "down")  # of routers and experts


class Tensor(NamedTuple):
    """One tensor of a checkpoint, or one per layer, and where it goes.

    Attributes:
      name: in the file; "{}" stands for the layer, and a second one for the expert.
      path: of the parameter. A layer's tensor is one row of the stacked array.
      layout: the file's axes, by their logical names; those in brackets are one axis
        there. The parameter's own axes stand in sharding.rules.
    """

    name: str
    path: str
    layout: str

    @property
    def stacks(self) -> int:
        """How many first axes of the parameter count tensors: layers, experts."""
        return self.name.count("{}")

    @property
    def kind(self) -> str:
        """One of MATRICES, as "kernel"; or "scale", "bias"."""
        return kind_of(self.path)

    @property
    def pattern(self) -> str:
        """How axes are regrouped, einops notation: file -> parameter of a layer."""
        axes = axes_of(self.path) or ()
        return f"{self.layout} -> {' '.join(filter(None, axes[self.stacks :]))}"

    @property
    def module(self) -> str:
        """The module that it is of, such as "lm_head"; "{}" stands for the layer."""
        return self.name.rpartition(".")[0]

    @property
    def in_layer(self) -> str:
        """The module's name in its layer, such as "self_attn.q_proj"."""
        return self.module.partition("{}.")[2]

    @property
    def num_inputs(self) -> int:
        """Of a layer's kernel, see `inputs_of`."""
        return inputs_of(self.path)

    def names(self, shape: Sequence[int]) -> list[str]:
        """Its name in each layer, and of each expert; or its one name.

        Args:
          shape: of the parameter; or `counts`.
        """
        indices = np.ndindex(*shape[: self.stacks])
        return [self.name.format(*index) for index in indices]


def counts(config: ModelConfig) -> tuple[int, int]:
    """(layers, experts) of a model."""
    return config.num_layers, config.experts.count if config.experts else 0


def kind_of(path: str) -> str:
    """The kind of the parameter at a path, see `Tensor.kind`."""
    return path.rpartition("/")[2]


def is_matrix(path: str) -> bool:
    """Whether the parameter at a path is one of MATRICES."""
    return kind_of(path) in MATRICES


def is_narrow(path: str) -> bool:
    """Whether a parameter that is frozen may be in the products' dtype: matrices, but
    not a scalar head's, which computes in float32 as norms and biases do."""
    return is_matrix(path) and not path.startswith("score/")


def is_linear(path: str) -> bool:
    """Whether it is the kernel of a layer: what adapters and quantization take."""
    return path.startswith("layers/") and kind_of(path) == "kernel"


def inputs_of(path: str) -> int:
    """How many axes of a layer's kernel, after the layers, meet the activations."""
    return num_inputs((axes_of(path) or ())[1:])


def sides_of(path: str) -> tuple[str, str]:
    """(inputs, outputs) of a layer's kernel, as groups of a layout."""
    axes, cut = (axes_of(path) or ())[1:], inputs_of(path)
    inputs, outputs = (" ".join(map(str, side)) for side in (axes[:cut], axes[cut:]))
    return f"({inputs})", f"({outputs})"


def groups(layout: str) -> list[list[str]]:
    """Axes of a file's tensor: "(n h) d" gives [["n", "h"], ["d"]]."""
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", layout)]


def file_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in the file, from the parameter's (of one layer).

    For example ("(n h) d -> d n h", (64, 8, 16)) gives (128, 64).
    """
    left, right = pattern.split(" -> ")
    sizes = dict(zip(right.split(), shape, strict=True))
    return tuple(math.prod(sizes[name] for name in group) for group in groups(left))


def _always(config: ModelConfig) -> bool:
    del config
    return True


def _apart(c: ModelConfig) -> bool:
    return c.qkv_layout == "apart"


def _layer_norm(c: ModelConfig) -> bool:
    return c.norm == "layer" and c.norm_bias


def _mlp_norm(c: ModelConfig) -> bool:
    return c.norm_place != "post" and c.parallel_norms != 1


def has_shared(config: ModelConfig) -> bool:
    """Whether there is an expert that every token goes to."""
    return config.experts is not None and config.experts.shared_size > 0


# Every parameter that there may be, and when: in the order of a checkpoint's files.
When = Callable[[ModelConfig], bool]
_PARAMETERS: tuple[tuple[str, When], ...] = (
    ("embed/embedding", _always),
    ("positions/embedding", lambda c: c.positions == "learned"),
    ("embed_norm/scale", lambda c: c.embed_norm),
    ("embed_norm/bias", lambda c: c.embed_norm and _layer_norm(c)),
    ("project_in/kernel", lambda c: c.embed_width is not None),
    ("layers/attention_norm/scale", lambda c: c.norm_place != "post"),
    (
        "layers/attention_norm/bias",
        lambda c: c.norm_place != "post" and _layer_norm(c),
    ),
    ("layers/attention/q/kernel", _apart),
    ("layers/attention/k/kernel", _apart),
    ("layers/attention/v/kernel", _apart),
    ("layers/attention/qkv/kernel", lambda c: c.qkv_layout == "joined"),
    ("layers/attention/qkv_groups/kernel", lambda c: c.qkv_layout == "groups"),
    ("layers/attention/o/kernel", _always),
    ("layers/attention/q/bias", lambda c: c.qkv_bias and _apart(c)),
    ("layers/attention/k/bias", lambda c: c.qkv_bias and _apart(c)),
    ("layers/attention/v/bias", lambda c: c.qkv_bias and _apart(c)),
    ("layers/attention/qkv/bias", lambda c: c.qkv_bias and c.qkv_layout == "joined"),
    (
        "layers/attention/qkv_groups/bias",
        lambda c: c.qkv_bias and c.qkv_layout == "groups",
    ),
    ("layers/attention/o/bias", lambda c: c.o_bias),
    ("layers/attention/q_norm/scale", lambda c: c.qk_norm is True),
    ("layers/attention/k_norm/scale", lambda c: c.qk_norm is True),
    ("layers/attention/q_all_norm/scale", lambda c: c.qk_norm == "whole"),
    ("layers/attention/k_all_norm/scale", lambda c: c.qk_norm == "whole"),
    ("layers/attention_post_norm/scale", lambda c: c.norm_place in ("both", "post")),
    ("layers/mlp_norm/scale", _mlp_norm),
    ("layers/mlp_norm/bias", lambda c: _mlp_norm(c) and _layer_norm(c)),
    (
        "layers/mlp/gate/kernel",
        lambda c: c.gated and not c.gate_up_joined and not c.experts,
    ),
    ("layers/mlp/up/kernel", lambda c: not c.gate_up_joined and not c.experts),
    ("layers/mlp/gate_up/kernel", lambda c: c.gate_up_joined),
    ("layers/mlp/down/kernel", lambda c: not c.experts),
    ("layers/mlp/gate/bias", lambda c: c.mlp_bias and c.gated),
    ("layers/mlp/up/bias", lambda c: c.mlp_bias),
    ("layers/mlp/down/bias", lambda c: c.mlp_bias),
    ("layers/mlp/router/weight", lambda c: c.experts is not None),
    ("layers/mlp/experts/gate", lambda c: c.experts is not None),
    ("layers/mlp/experts/up", lambda c: c.experts is not None),
    ("layers/mlp/experts/down", lambda c: c.experts is not None),
    ("layers/mlp/shared_gate/weight", has_shared),
    ("layers/mlp/shared/gate/kernel", has_shared),
    ("layers/mlp/shared/up/kernel", has_shared),
    ("layers/mlp/shared/down/kernel", has_shared),
    ("layers/mlp_post_norm/scale", lambda c: c.norm_place in ("both", "post")),
    ("norm/scale", lambda c: c.final_norm),
    ("norm/bias", lambda c: c.final_norm and _layer_norm(c)),
    ("project_out/kernel", lambda c: c.embed_width is not None),
    ("unembed/kernel", lambda c: not c.num_labels and not c.tie_embeddings),
    ("unembed/bias", lambda c: not c.num_labels and c.head_bias),
    ("score/kernel", lambda c: c.num_labels > 0),
)


def paths_of(config: ModelConfig) -> list[str]:
    """The parameters of a model of this config, in the order of a checkpoint."""
    return [path for path, when in _PARAMETERS if when(config)]


def layout_of(path: str, transposed: bool = False) -> str:
    """How a Hugging Face file has a parameter's axes: outputs first, as torch has them.

    Args:
      path: of the parameter.
      transposed: inputs first, as GPT-2 has them.
    """
    counted = ("layers", "experts")
    axes = [axis for axis in axes_of(path) or () if axis and axis not in counted]
    if kind_of(path) in ("embedding", "scale"):
        return " ".join(axes)
    if kind_of(path) == "bias":
        return f"({' '.join(axes)})"
    cut = num_inputs(axes)
    sides = [axes[:cut], axes[cut:]] if transposed else [axes[cut:], axes[:cut]]
    return " ".join(f"({' '.join(side)})" for side in sides)
