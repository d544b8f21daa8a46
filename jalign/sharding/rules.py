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
    (r"positions/embedding", ("positions", "embed")),
    (r"project_in/kernel", ("width", "embed")),
    (r"project_out/kernel", ("embed", "width")),
    (r"layers/attention/q/kernel", ("layers", "embed", "heads", "head_dim")),
    (r"layers/attention/[kv]/kernel", ("layers", "embed", "kv_heads", "head_dim")),
    (r"layers/attention/qkv/kernel", ("layers", "embed", "all_heads", "head_dim")),
    (
        r"layers/attention/qkv_groups/kernel",
        ("layers", "embed", "kv_heads", "group", "head_dim"),
    ),
    (r"layers/attention/o/kernel", ("layers", "heads", "head_dim", "embed")),
    (r"layers/attention/q/bias", ("layers", "heads", "head_dim")),
    (r"layers/attention/[kv]/bias", ("layers", "kv_heads", "head_dim")),
    (r"layers/attention/qkv/bias", ("layers", "all_heads", "head_dim")),
    (
        r"layers/attention/qkv_groups/bias",
        ("layers", "kv_heads", "group", "head_dim"),
    ),
    (r"layers/attention/[qk]_norm/scale", ("layers", "head_dim")),
    (r"layers/attention/[qk]_all_norm/scale", ("layers", "norm")),
    (r"layers/(mlp|mlp/shared)/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"layers/mlp/gate_up/kernel", ("layers", "embed", "pair", "mlp")),
    (r"layers/(mlp|mlp/shared)/down/kernel", ("layers", "mlp", "embed")),
    (r"layers/mlp/(gate|up)/bias", ("layers", "mlp")),
    (r"layers/mlp/experts/(gate|up)", ("layers", "experts", "embed", "mlp")),
    (r"layers/mlp/experts/down", ("layers", "experts", "mlp", "embed")),
    (r"layers/mlp/(router|shared_gate)/weight", ("layers", "embed", "outputs")),
    # Norms are small: replicating them saves an all-gather each. So do biases of what
    # is whole on every device.
    (r"layers/[a-z_]+_norm/(scale|bias)", ("layers", "norm")),
    (r"layers/(attention/o|mlp/down)/bias", ("layers", "norm")),
    (r"(embed_)?norm/(scale|bias)", ("norm",)),
    (r"unembed/kernel", ("embed", "vocab")),
    (r"unembed/bias", ("vocab",)),
    (r"score/kernel", ("embed", "labels")),
)
AXIS_RULES: dict[str, tuple[str, ...]] = {
    # weights
    "layers": (),
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    "positions": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "all_heads": ("tensor",),
    "group": (),
    "head_dim": (),
    "mlp": ("tensor",),
    "pair": (),
    "experts": (),
    "outputs": (),
    "width": (),
    "norm": (),
    "labels": (),
    "rank": (),
    # activations
    "batch": ("data", "fsdp"),
    "time": ("context",),
    "share": ("data", "fsdp", "context"),  # of a row, as a row: context.py
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

# Of the meshes of groups.py, where fsdp x context = groups x members.
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
REPLICATE_IF_UNEVEN = frozenset({"kv_heads", "all_heads"})


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
    cut = num_inputs(inner)
    return layers, *part_axes(part[2], inner[:cut], inner[cut:])


def num_inputs(axes: Sequence[str | None]) -> int:
    """How many axes of a kernel, the first ones, meet the activations."""
    return 1 if axes[0] == "embed" else len(axes) - 1


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
