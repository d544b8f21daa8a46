"""What a family's config.json says in its own way, both directions.

A trait reads some keys, with the family's defaults filled in, into fields of a
ModelConfig, and writes the keys that say the same.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jalign.models.config import Experts, LayerKind, ModelConfig
from jalign.models.hf_checks import ATTN_CONFIG_CHECKS, ROPE_CHECKS, check_values

Values = dict[str, Any]


class Trait(NamedTuple):
    """`read`: values of a config.json, and fields of a ModelConfig that are known
    already -> more of them. `write`: its inverse."""

    read: Callable[[Values, Values], Values]
    write: Callable[[ModelConfig], Values]


def switch(key: str, *fields: str) -> Trait:
    """A true or false that several fields take."""
    return Trait(
        lambda values, _: dict.fromkeys(fields, bool(values[key])),
        lambda c: {key: getattr(c, fields[0])},
    )


_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def activation(key: str = "hidden_act") -> Trait:
    """The MLP's activation by transformers' names, several of which are one formula."""

    def read(values: Values, _: Values) -> Values:
        if values[key] not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"{key}={values[key]!r} is not supported; known: {known}")
        return {"activation": _ACTIVATIONS[values[key]]}

    def write(c: ModelConfig) -> Values:
        name = "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else c.activation
        return {key: name}

    return Trait(read, write)


# sliding_window is in force wherever it is set.
window = Trait(
    lambda values, _: {"sliding_window": values.get("sliding_window") or None},
    lambda c: {"sliding_window": c.sliding_window},
)


def _read_switched(values: Values, _: Values) -> Values:
    size, layers = values.get("sliding_window"), values["num_hidden_layers"]
    if size is None or not values.get("use_sliding_window", False):
        return {}
    full = min(values["max_window_layers"], layers)
    types = values.get("layer_types") or (
        ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    )
    kinds = _kinds(types, layers, size)
    if len(set(kinds)) > 1:
        return {"layer_kinds": kinds}
    return {"sliding_window": kinds[0].window}


def _write_switched(c: ModelConfig) -> Values:
    size = next((kind.window for kind in c.kinds if kind.window), None)
    keys: Values = {"use_sliding_window": size is not None, "sliding_window": size}
    full = [kind.window for kind in c.layer_kinds].count(None)
    keys["max_window_layers"] = full if c.layer_kinds else c.num_layers
    if c.sliding_window is not None:
        keys["max_window_layers"] = 0
    return keys | (_write_types(c) if c.layer_kinds else {})


# Only with use_sliding_window, from layer max_window_layers on.
switched_window = Trait(_read_switched, _write_switched)
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _kinds(types: list, layers: int, size: int, local: str = "main"):
    """transformers' layer_types -> layer_kinds."""
    if len(types) != layers:
        raise ValueError(f"layer_types names {len(types)} layers of {layers}")
    known = {_SLIDING: LayerKind(size, local), _FULL: LayerKind()}
    for name in types:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"layer_types: {name!r} is not one of {', '.join(known)}")
    return tuple(known[name] for name in types)


def _write_types(c: ModelConfig) -> Values:
    return {"layer_types": [_SLIDING if k.window else _FULL for k in c.layer_kinds]}


def alternating(every: int, rope_theta: str = "") -> Trait:
    """Windows on all layers but each `every`-th, which sees all tokens.

    Args:
      every: 2 for Gemma 2, 6 for Gemma 3, where the file says nothing else.
      rope_theta: key of the base in layers with a window; "" where it is the others'.
    """
    pattern = "sliding_window_pattern"

    def read(values: Values, _: Values) -> Values:
        layers = values["num_hidden_layers"]
        period = values.get(pattern) or values.get("_" + pattern) or every
        types = values.get("layer_types") or [
            _SLIDING if (i + 1) % period else _FULL for i in range(layers)
        ]
        if not rope_theta:
            return {"layer_kinds": _kinds(types, layers, values["sliding_window"])}
        two = (values.get("rope_parameters") or {}).get("sliding_attention") or {}
        check_values(two, ROPE_CHECKS, "rope_parameters.sliding_attention.")
        if two.get("rope_type", "default") != "default":
            raise ValueError("rope scaling in layers with a window is not supported")
        return {
            "layer_kinds": _kinds(types, layers, values["sliding_window"], "local"),
            "local_rope_theta": float(two.get("rope_theta", values[rope_theta])),
        }

    def write(c: ModelConfig) -> Values:
        size = next((kind.window for kind in c.kinds if kind.window), 4096)
        keys = {"sliding_window": size} | _write_types(c)
        return keys | ({rope_theta: c.local_rope_theta} if rope_theta else {})

    return Trait(read, write)


def _read_no_rope(values: Values, _: Values) -> Values:
    layers = values["num_hidden_layers"]
    every = values["no_rope_layer_interval"]
    # 1 is a layer that has rotary positions.
    flags = values.get("no_rope_layers") or [
        int((i + 1) % every != 0) for i in range(layers)
    ]
    if len(flags) != layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(f"no_rope_layers is not a 0 or 1 for each of {layers} layers")
    names = {0: "none", 1: "main"}
    return {"layer_kinds": tuple(LayerKind(None, names[flag]) for flag in flags)}


no_rope_layers = Trait(
    _read_no_rope,
    lambda c: {"no_rope_layers": [int(k.rope == "main") for k in c.layer_kinds]},
)
query_scalar = Trait(
    lambda values, _: {"query_scale": values["query_pre_attn_scalar"] ** -0.5},
    lambda c: {"query_pre_attn_scalar": _whole((c.query_scale or 1.0) ** -2)},
)
embed_sqrt = Trait(
    lambda _, known: {"embed_scale": math.sqrt(known["hidden_size"])}, lambda c: {}
)
logits_scaling = Trait(
    lambda values, _: {"logit_scale": 1 / values["logits_scaling"]},
    lambda c: {"logits_scaling": _whole(1 / c.logit_scale)},
)


def _whole(x: float) -> float:
    """Without the rounding of a power or quotient."""
    return round(x) if math.isclose(x, round(x), rel_tol=1e-12) else x


def _read_opt(values: Values, known: Values) -> Values:
    width, pre = values["word_embed_proj_dim"], values["do_layer_norm_before"]
    return {
        "embed_width": None if width in (None, known["hidden_size"]) else width,
        "norm_place": "pre" if pre else "after",
        "final_norm": bool(pre and not values.get("_remove_final_layer_norm")),
    }


opt = Trait(
    _read_opt,
    lambda c: {
        "word_embed_proj_dim": c.head_width,
        "do_layer_norm_before": c.norm_place == "pre",
        "_remove_final_layer_norm": c.norm_place == "pre" and not c.final_norm,
    },
)


def _read_mpt(values: Values, _: Values) -> Values:
    said = {"alibi_bias_max": 8, "alibi": True} | (values.get("attn_config") or {})
    check_values(said, ATTN_CONFIG_CHECKS, "attn_config.")
    wanted = {"alibi": True, "qk_ln": False, "prefix_lm": False}
    for key, value in (wanted | {"attn_type": "multihead_attention"}).items():
        if said.get(key, value) not in (value, None):
            shown = f"attn_config.{key}={said[key]!r}"
            raise ValueError(f"{shown} is not supported, only {value!r}")
    fields = {"alibi_max": float(said["alibi_bias_max"])}
    return fields | {
        "clip_qkv": said.get("clip_qkv") or None,
        "query_scale": said.get("softmax_scale"),
    }


def _write_mpt(c: ModelConfig) -> Values:
    said = {"alibi": True, "alibi_bias_max": _whole(c.alibi_max)}
    said |= {"clip_qkv": c.clip_qkv, "softmax_scale": c.query_scale}
    return {"attn_config": {key: x for key, x in said.items() if x is not None}}


mpt = Trait(_read_mpt, _write_mpt)


def _read_falcon(values: Values, known: Values) -> Values:
    new, heads = values["new_decoder_architecture"], known["num_heads"]
    kv_heads = 1 if values["multi_query"] else heads
    norms = 1 if values["parallel_attn"] else 0
    if new:
        kv_heads = values.get("num_kv_heads") or heads
        norms = values.get("num_ln_in_parallel_attn") or 2
    return {
        "num_kv_heads": kv_heads,
        "parallel_norms": norms,
        "positions": "alibi" if values["alibi"] else "rope",
    }


def _write_falcon(c: ModelConfig) -> Values:
    new = c.parallel_norms == 2 or c.num_kv_heads not in (1, c.num_heads)
    return {
        "new_decoder_architecture": new,
        "num_kv_heads": c.num_kv_heads,
        "multi_query": c.num_kv_heads == 1,
        "parallel_attn": c.parallel_norms > 0,
        "num_ln_in_parallel_attn": c.parallel_norms if new else None,
        "alibi": c.positions == "alibi",
    }


falcon = Trait(_read_falcon, _write_falcon)
parallel = Trait(
    lambda values, _: {"parallel_norms": 2 if values["use_parallel_residual"] else 0},
    lambda c: {"use_parallel_residual": c.parallel_norms == 2},
)


def experts(
    key: str, default: int, *, shared: bool = False, normalize: bool = False
) -> Trait:
    """A mixture of experts.

    Args:
      key: of their number; transformers 4 and 5 have two names for it.
      default: their number, where the file has neither.
      shared: there is one for every token, of shared_expert_intermediate_size.
      normalize: a token's weights always sum to 1; else the file says.
    """
    other = "num_local_experts" if key == "num_experts" else "num_experts"

    def read(values: Values, _: Values) -> Values:
        step, dense = (
            values.get("decoder_sparse_step", 1),
            values.get("mlp_only_layers"),
        )
        if step != 1 or dense:
            raise ValueError(
                f"decoder_sparse_step={step}, mlp_only_layers={dense}: layers without "
                "experts beside layers with them are not supported"
            )
        count = values.get(key) or values.get(other) or default
        width = values["shared_expert_intermediate_size"] if shared else 0
        whole = normalize or bool(values["norm_topk_prob"])
        return {"experts": Experts(count, values["num_experts_per_tok"], whole, width)}

    def write(c: ModelConfig) -> Values:
        e = c.experts
        assert e is not None
        keys: Values = {key: e.count, "num_experts_per_tok": e.per_token}
        if shared:
            keys["shared_expert_intermediate_size"] = e.shared_size
        return keys if normalize else keys | {"norm_topk_prob": e.normalize}

    return Trait(read, write)


def joined(traits: tuple[Trait, ...], values: Values, known: Values) -> Values:
    """What all of them read, the later ones from what the earlier ones have found."""
    return functools.reduce(lambda seen, t: seen | t.read(values, seen), traits, known)
