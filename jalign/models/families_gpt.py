"""Families with names of their own, most of them older than llama.

Sources: transformers' configuration and modeling files of each, by name, and papers.
"""

from jalign.models import hf_traits as traits
from jalign.models.config import ModelConfig
from jalign.models.family import COMMON, HEADS, NORMS, Family, Modules, named
from jalign.models.hf_rope import rope, rotary_dim

_NEOX_LAYER = {
    "attention/qkv_groups": "query_key_value",
    "attention/o": "dense",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
} | NORMS


def _fused(attention: str) -> Modules:
    return {
        path: f"{attention}.{name}" if path.startswith("attention/") else name
        for path, name in _NEOX_LAYER.items()
    }


def _falcon_norms(config: ModelConfig) -> Modules:
    if config.parallel_norms != 2:
        return {}
    names = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    return named("transformer.", {}, "h.{}.", names)


_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_MASK_BUFFERS = (r".*\.attn\.(bias|masked_bias)",)
# LayerNorm, and a plain MLP that has biases.
_OLD = {"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True}
_BIASES = {"qkv_bias": True, "o_bias": True}
_NONE = dict.fromkeys(("num_kv_heads", "head_dim"), "")
_GPT2_KEYS = _NONE | {"hidden_size": "n_embd", "num_layers": "n_layer"}
_GPT2_KEYS |= {"num_heads": "n_head", "max_position": "n_positions"}
_GPT2_KEYS |= {"intermediate_size": "n_inner", "norm_eps": "layer_norm_epsilon"}
_GPT2_FILE = COMMON | {"layer_norm_epsilon": 1e-5, "n_inner": None}
_GPT2_FILE |= {"bos_token_id": 50256, "eos_token_id": 50256}
_GPT2_FILE |= {"activation_function": "gelu_new"}


GPT_FAMILIES = {  # Zhang et al. 2022 (arXiv:2205.01068).
    "opt": Family(
        "OPT",
        modules=named(
            "model.decoder.",
            {
                "embed": "embed_tokens",
                "positions": "embed_positions",
                "project_in": "project_in",
                "project_out": "project_out",
                "norm": "final_layer_norm",
            }
            | HEADS,
            "layers.{}.",
            {f"attention/{x}": f"self_attn.{x}_proj" for x in "qkv"}
            | {"attention/o": "self_attn.out_proj", "mlp/up": "fc1", "mlp/down": "fc2"}
            | {
                "attention_norm": "self_attn_layer_norm",
                "mlp_norm": "final_layer_norm",
            },
        ),
        switches=_OLD
        | {"positions": "learned", "position_offset": 2, "norm_eps": 1e-5},
        keys=_NONE | {"intermediate_size": "ffn_dim", "norm_eps": ""},
        defaults=COMMON
        | {"tie_word_embeddings": True, "max_position_embeddings": 2048}
        | {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "enable_bias": True}
        | {"word_embed_proj_dim": None, "do_layer_norm_before": True}
        | {"activation_function": "relu"},
        traits=(
            traits.opt,
            traits.switch("enable_bias", "qkv_bias", "o_bias", "mlp_bias"),
            traits.activation("activation_function"),
        ),
        fixed={"layer_norm_elementwise_affine": True},
        root="model.",
    ),
    # BigScience 2022 (arXiv:2211.05100).
    "bloom": Family(
        "Bloom",
        modules=named(
            "transformer.",
            {"embed": "word_embeddings", "embed_norm": "word_embeddings_layernorm"}
            | {"norm": "ln_f"}
            | HEADS,
            "h.{}.",
            _fused("self_attention"),
        ),
        switches=_OLD
        | _BIASES
        | {"positions": "alibi", "embed_norm": True, "qkv_layout": "groups"}
        | {"activation": "gelu_tanh"},
        keys=_NONE
        | {"num_layers": "n_layer", "num_heads": "n_head", "intermediate_size": ""}
        | {"norm_eps": "layer_norm_epsilon", "max_position": ""},
        defaults=COMMON
        | _IDS
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
        fixed={"apply_residual_connection_post_layernorm": False},
        root="transformer.",
    ),
    # MosaicML 2023, https://www.databricks.com/blog/mpt-7b.
    "mpt": Family(
        "Mpt",
        modules=named(
            "transformer.",
            {"embed": "wte", "norm": "norm_f"} | HEADS,
            "blocks.{}.",
            {"attention/qkv": "attn.Wqkv", "attention/o": "attn.out_proj"}
            | {"mlp/up": "ffn.up_proj", "mlp/down": "ffn.down_proj"}
            | {"attention_norm": "norm_1", "mlp_norm": "norm_2"},
        ),
        switches={
            "norm": "layer",
            "gated": False,
            "activation": "gelu",
            "positions": "alibi",
        }
        | {"qkv_layout": "joined"},
        keys=_NONE
        | {"hidden_size": "d_model", "num_layers": "n_layers", "num_heads": "n_heads"}
        | {"intermediate_size": "", "norm_eps": "layer_norm_epsilon"}
        | {"max_position": "max_seq_len"},
        defaults=COMMON
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5}
        | {"max_seq_len": 2048},
        traits=(traits.mpt,),
        fixed={"expansion_ratio": 4, "no_bias": True, "logit_scale": None},
        root="transformer.",
    ),
    # Almazrouei et al. 2023 (arXiv:2311.16867).
    "falcon": Family(
        "Falcon",
        modules=named(
            "transformer.",
            {"embed": "word_embeddings", "norm": "ln_f"} | HEADS,
            "h.{}.",
            _fused("self_attention"),
        ),
        switches={
            "norm": "layer",
            "norm_bias": True,
            "gated": False,
            "qkv_layout": "groups",
        }
        | {"alibi_rounded": True},
        keys=_NONE
        | {"intermediate_size": "ffn_hidden_size", "norm_eps": "layer_norm_epsilon"},
        defaults=COMMON
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "bias": False}
        | {"new_decoder_architecture": False, "multi_query": True, "alibi": False}
        | {"parallel_attn": True, "bos_token_id": 11, "eos_token_id": 11}
        | {"ffn_hidden_size": None, "max_position_embeddings": 2048}
        | {"activation": "gelu"},
        traits=(
            traits.falcon,
            traits.switch("bias", "qkv_bias", "o_bias", "mlp_bias"),
            traits.activation("activation"),
            rope(),
        ),
        fixed={"apply_residual_connection_post_layernorm": False},
        root="transformer.",
        variant=_falcon_norms,
    ),
    # Black et al. 2022 (arXiv:2204.06745), Biderman et al. 2023 (arXiv:2304.01373).
    "gpt_neox": Family(
        "GPTNeoX",
        modules=named(
            "gpt_neox.",
            {"embed": "embed_in", "norm": "final_layer_norm"}
            | HEADS
            | {"unembed": "/embed_out"},
            "layers.{}.",
            _fused("attention"),
        ),
        switches=_OLD | {"qkv_layout": "groups"},
        keys=_NONE | {"norm_eps": "layer_norm_eps"},
        defaults=COMMON
        | {"layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2}
        | {"rotary_pct": 0.25, "rotary_emb_base": 10_000, "attention_bias": True}
        | {"use_parallel_residual": True, "max_position_embeddings": 2048}
        | {"hidden_act": "gelu"},
        traits=(
            traits.parallel,
            traits.switch("attention_bias", "qkv_bias", "o_bias"),
            traits.activation(),
            rope("rotary_emb_base", "rotary_pct"),
        ),
        root="gpt_neox.",
        ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
    # Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax.
    "gptj": Family(
        "GPTJ",
        modules=named(
            "transformer.",
            {"embed": "wte", "norm": "ln_f"} | HEADS,
            "h.{}.",
            {f"attention/{x}": f"attn.{x}_proj" for x in "qkv"}
            | {"attention/o": "attn.out_proj", "attention_norm": "ln_1"}
            | {"mlp/up": "mlp.fc_in", "mlp/down": "mlp.fc_out"},
        ),
        switches=_OLD | {"parallel_norms": 1, "head_bias": True, "rotary_pairs": True},
        keys=_GPT2_KEYS | {"rotary_dim": "rotary_dim"},
        defaults=_GPT2_FILE | {"n_positions": 2048, "rotary_dim": 64},
        traits=(traits.activation("activation_function"), rotary_dim),
        root="transformer.",
        ignored=_MASK_BUFFERS,
    ),
    # Radford et al. 2019, "Language models are unsupervised multitask learners".
    "gpt2": Family(
        "GPT2",
        modules=named(
            "transformer.",
            {"embed": "wte", "positions": "wpe", "norm": "ln_f"} | HEADS,
            "h.{}.",
            {"attention/qkv": "attn.c_attn", "attention/o": "attn.c_proj"}
            | {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
            | {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
        ),
        switches=_OLD | _BIASES | {"positions": "learned", "qkv_layout": "joined"},
        keys=_GPT2_KEYS,
        defaults=_GPT2_FILE | {"tie_word_embeddings": True, "n_positions": 1024},
        traits=(traits.activation("activation_function"),),
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        | {"add_cross_attention": False},
        root="transformer.",
        ignored=_MASK_BUFFERS,
        transposed=True,
    ),
}
