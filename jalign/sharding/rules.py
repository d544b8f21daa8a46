"""The two tables: parameter path -> logical axes; logical axis -> mesh axes.

A path is the keys from the root joined by "/"; the first rule whose
regex matches the whole path wins. Layers are stacked, so their axis 0 is "layers".
"""

import re
from collections.abc import Sequence

LogicalAxes = tuple[str | None, ...]
ParamRules = Sequence[tuple[str, LogicalAxes]]

PARAM_RULES: ParamRules = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"layers/attention/q/kernel", ("layers", "embed", "heads", "head_dim")),
    (r"layers/attention/[kv]/kernel", ("layers", "embed", "kv_heads", "head_dim")),
    (r"layers/attention/o/kernel", ("layers", "heads", "head_dim", "embed")),
    (r"layers/attention/q/bias", ("layers", "heads", "head_dim")),
    (r"layers/attention/[kv]/bias", ("layers", "kv_heads", "head_dim")),
    (r"layers/attention/[qk]_norm/scale", ("layers", "head_dim")),
    (r"layers/mlp/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/down/kernel", ("layers", "mlp", "embed")),
    # Scales are small: replicating them saves an all-gather per norm.
    (r"layers/(attention|mlp)_norm/scale", ("layers", "norm")),
    (r"norm/scale", ("norm",)),
    (r"unembed/kernel", ("embed", "vocab")),
    (r"score/kernel", ("embed", "labels")),
)

AXIS_RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),
    "labels": (),
    "rank": (),
    # activations
    "batch": ("data", "fsdp"),
    "time": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

# Of the meshes of groups.py, where fsdp = groups x members.
GROUP_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "groups", "members"),
    "group": ("data", "groups"),
    "row": ("members",),
    "member": ("members",),
    "embed_of_group": ("groups",),
    "vocab": ("tensor", "members"),
    # as AXIS_RULES cuts the parameters
    "embed": ("groups", "members"),
    "stored": ("tensor",),
}

# Weights of these axes are replicated where the mesh axis does not divide them:
# a model with 4 kv heads may run on tensor=8, each pair of shards holding the same.
REPLICATE_IF_UNEVEN = frozenset({"kv_heads"})


_QUANTIZED = r"kernel/(?:nf4|absmax|nested_absmax|nested_offset|int8|scale)"
_PART = re.compile(rf"(.*/)({_QUANTIZED}|lora_(?:a|b|scale))")


def axes_of(path: str, param_rules: ParamRules = PARAM_RULES) -> LogicalAxes | None:
    """The logical axes of a parameter, or None where no rule matches its path.

    An adapter's are its kernel's: A has the inputs and its rank, B the rank and the
    outputs, cut as the kernel is. So are the leaves of a quantized kernel. Of a kernel,
    "embed" is either all that goes in or all that comes out.
    """
    part = _PART.fullmatch(path)
    if part is None:
        matches = (axes for regex, axes in param_rules if re.fullmatch(regex, path))
        return next(matches, None)
    kernel = axes_of(part[1] + "kernel", param_rules)
    if kernel is None:
        return None
    layers, *inner = kernel
    cut = 1 if inner[0] == "embed" else len(inner) - 1
    return layers, *part_axes(part[2], inner[:cut], inner[cut:])


def part_axes(
    name: str, inputs: Sequence[str | None], outputs: Sequence[str | None]
) -> LogicalAxes:
    """The axes of one layer's adapter, or leaf of a quantized kernel.

    Args:
      name: the end of its path, such as "lora_a" or "kernel/nf4".
      inputs, outputs: the axes of the kernel. Blocks run along the inputs, and are cut
        as the first of them is.
    """
    return {
        "lora_a": (*inputs, "rank"),
        "lora_b": ("rank", *outputs),
        "lora_scale": (),
        "kernel/nf4": (inputs[0], None, *outputs),
        "kernel/absmax": (inputs[0], *outputs),
        "kernel/nested_absmax": (None,),
        "kernel/nested_offset": (),
        "kernel/int8": (*inputs, *outputs),
        "kernel/scale": (*outputs,),
    }[name]


def bends(path: str, axis: str | None) -> bool:
    """Whether an axis of a parameter is replicated where the mesh does not divide it.

    Of quantized kernels any axis: it may count blocks, which are cut as wholes only.
    """
    return axis in REPLICATE_IF_UNEVEN or bool(re.fullmatch(f".*/{_QUANTIZED}", path))
