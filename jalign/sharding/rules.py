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


def axes_of(path: str, param_rules: ParamRules = PARAM_RULES) -> LogicalAxes | None:
    """The logical axes of a parameter, or None where no rule matches its path."""
    matches = (axes for regex, axes in param_rules if re.fullmatch(regex, path))
    return next(matches, None)
