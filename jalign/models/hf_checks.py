"""What values of a config.json may be, before anything is computed of them."""

from typing import Any, NamedTuple


class Check(NamedTuple):
    """What a value of a JSON file may be, where it is there and not null.

    Attributes:
      kind: its type; float takes whole numbers too, neither takes true or false.
      low, high: bounds of a number, both allowed. The high ones are far beyond any
        model that there is: they stop what would fill the memory or never end.
    """

    kind: type
    low: float = 0
    high: float = 0


COUNT = Check(int, 1, 2**31 - 1)
POSITIVE = Check(float, 1e-30, 1e30)
SHARE = Check(float, 1e-30, 1)
NUMBER = Check(float, 0, 1e30)
# By the field of ModelConfig that takes the value as it is.
FIELD_CHECKS = {
    "vocab_size": Check(int, 1, 2**24),
    "hidden_size": Check(int, 1, 2**18),
    "intermediate_size": Check(int, 1, 2**20),
    "num_layers": Check(int, 1, 2**12),
    "num_heads": Check(int, 1, 2**12),
    "num_kv_heads": Check(int, 1, 2**12),
    "head_dim": Check(int, 1, 2**14),
    "norm_eps": Check(float, 1e-30, 1),
    "tie_embeddings": Check(bool),
    "max_position": COUNT,
    "rotary_dim": Check(int, 1, 2**14),
    "embed_scale": POSITIVE,
    "query_scale": POSITIVE,
    "residual_scale": POSITIVE,
    "attention_softcap": POSITIVE,
    "final_softcap": POSITIVE,
}
# By the key in the file, of what is worked out or has to be one thing.
KEY_CHECKS = {
    "architectures": Check(list),
    "num_labels": Check(int, 0, 2**31 - 1),
    "id2label": Check(dict),
    "sliding_window": Check(int, 0, 2**31 - 1),
    "use_sliding_window": Check(bool),
    "max_window_layers": Check(int, 0, 2**31 - 1),
    "layer_types": Check(list),
    "no_rope_layers": Check(list),
    "sliding_window_pattern": COUNT,
    "_sliding_window_pattern": COUNT,
    "no_rope_layer_interval": COUNT,
    "shared_expert_intermediate_size": Check(int, 1, 2**20),
    "hidden_act": Check(str),
    "activation_function": Check(str),
    "activation": Check(str),
    "rope_theta": POSITIVE,
    "rope_local_base_freq": POSITIVE,
    "rotary_emb_base": POSITIVE,
    "rotary_pct": SHARE,
    "partial_rotary_factor": SHARE,
    "rope_scaling": Check(dict),
    "rope_parameters": Check(dict),
    "original_max_position_embeddings": COUNT,
    "query_pre_attn_scalar": POSITIVE,
    "logits_scaling": POSITIVE,
    "word_embed_proj_dim": COUNT,
    "attn_config": Check(dict),
    "num_kv_heads": COUNT,
    "num_ln_in_parallel_attn": Check(int, 1, 2),
    "text_config": Check(dict),
} | dict.fromkeys(
    ("num_experts", "num_local_experts", "num_experts_per_tok"), Check(int, 1, 2**16)
)
KEY_CHECKS |= dict.fromkeys(
    (
        *("attention_bias", "mlp_bias", "bias", "enable_bias", "qkv_bias"),
        *("alibi", "multi_query", "parallel_attn", "new_decoder_architecture"),
        *("use_parallel_residual", "do_layer_norm_before", "norm_topk_prob"),
    ),
    Check(bool),
)
ATTN_CONFIG_CHECKS = {
    "alibi": Check(bool),
    "alibi_bias_max": POSITIVE,
    "clip_qkv": NUMBER,
    "softmax_scale": POSITIVE,
}
_ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor")
_ROPE_NUMBERS += ("high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
ROPE_CHECKS = dict.fromkeys(_ROPE_NUMBERS, POSITIVE) | {
    "partial_rotary_factor": SHARE,
    "full_attention": Check(dict),
    "sliding_attention": Check(dict),
    "rope_type": Check(str),
    "type": Check(str),
    "original_max_position_embeddings": COUNT,
    "mscale": NUMBER,
    "mscale_all_dim": NUMBER,
    "truncate": Check(bool),
    "short_factor": Check(list),
    "long_factor": Check(list),
}


def check_values(raw: dict[str, Any], checks: dict[str, Check], of: str = "") -> None:
    """Raises ValueError naming the first key whose value is of no use.

    Args:
      raw: of a JSON file.
      checks: key -> what its value may be.
      of: what goes before the key in a message.
    """
    for key, check in checks.items():
        value = raw.get(key)
        if value is None:
            continue
        shown = f"{of}{key}={repr(value)[:80]}"  # a stranger's value may be long
        kinds = (int, float) if check.kind is float else (check.kind,)
        if type(value) not in kinds:
            name = {dict: "mapping", float: "number"}.get(check.kind)
            raise ValueError(f"{shown} is not a {name or check.kind.__name__}")
        if check.kind in (int, float) and not check.low <= value <= check.high:
            bounds = f"{check.low:g} to {check.high:g}"
            raise ValueError(f"{shown} is out of bounds: {bounds}")
