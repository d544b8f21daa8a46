"""Families with llama's names: llama, and what differs from it by switches.

Sources: transformers' configuration and modeling files of each, by name; the papers of
later ones stand at their rows.
"""

from jalign.models import hf_traits as traits
from jalign.models.family import COMMON, HEADS, NORMS, Family, Modules, named
from jalign.models.hf_rope import rope

_TOP = {"embed": "embed_tokens", "norm": "norm"}
_ATTENTION = {f"attention/{x}": f"self_attn.{x}_proj" for x in "qkvo"}
_ATTENTION |= {f"attention/{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
_MLP = {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_INNER = _ATTENTION | _MLP | NORMS
LLAMA = named("model.", _TOP | HEADS, "layers.{}.", _INNER)
_POST = {"attention_post_norm": "post_attention_layernorm"}
_POST |= {"mlp_post_norm": "post_feedforward_layernorm"}
_GEMMA2 = {"mlp_norm": "pre_feedforward_layernorm"} | _POST
_EXPERTS = {f"mlp/experts/{x}": f"mlp.experts.{{}}.{x}_proj" for x in ("gate", "up")}
_EXPERTS |= {"mlp/experts/down": "mlp.experts.{}.down_proj", "mlp/router": "mlp.gate"}
_SHARED = {f"mlp/shared/{x}": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up")}
_SHARED |= {"mlp/shared/down": "mlp.shared_expert.down_proj"}
_SHARED |= {"mlp/shared_gate": "mlp.shared_expert_gate"}
_MIXTRAL = {"mlp/router": "block_sparse_moe.gate"} | {
    f"mlp/experts/{path}": f"block_sparse_moe.experts.{{}}.{name}"
    for path, name in {"gate": "w1", "up": "w3", "down": "w2"}.items()
}


def _with(inner: Modules) -> Modules:
    return LLAMA | named("model.", {}, "layers.{}.", inner)


_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_RMS = COMMON | {"rms_norm_eps": 1e-6}
_ROTARY_BUFFERS = (r".*\.self_attn\.rotary_emb\.inv_freq",)
_SILU = {"hidden_act": "silu"}
_NO_BIAS = {"attention_bias": False}
_PLAIN = _SILU | _NO_BIAS | {"mlp_bias": False}
_QWEN = _RMS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {"norm_offset": True, "activation": "gelu_tanh"}
_GEMMA_FILE = _RMS | {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA_FILE |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_CAPS = {
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
_GEMMA2_FILE = _GEMMA_FILE | {"num_key_value_heads": 4, "max_position_embeddings": 8192}
_GEMMA2_FILE |= {"query_pre_attn_scalar": 256, "sliding_window": 4096}
_GEMMA2_FILE |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA2_TRAITS = (traits.embed_sqrt, traits.query_scalar, rope(), traits.alternating(2))

LLAMA_FAMILIES = {
    "llama": Family(
        "Llama",
        modules=LLAMA,
        defaults=_RMS
        | _IDS
        | {"num_key_value_heads": None, "max_position_embeddings": 2048},
        traits=(rope(),),
        fixed=_PLAIN,
        ignored=_ROTARY_BUFFERS,
    ),
    "mistral": Family(
        "Mistral",
        modules=LLAMA,
        defaults=_RMS
        | _IDS
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"sliding_window": 4096},
        traits=(rope(), traits.window),
        fixed=_SILU,
        ignored=_ROTARY_BUFFERS,
    ),
    "qwen2": Family(
        "Qwen2",
        modules=LLAMA,
        switches={"qkv_bias": True},
        defaults=_QWEN,
        traits=(rope(), traits.switched_window),
        fixed=_SILU,
        ignored=_ROTARY_BUFFERS,
    ),
    "qwen3": Family(
        "Qwen3",
        modules=LLAMA,
        switches={"qk_norm": True},
        defaults=_QWEN | {"head_dim": 128},
        traits=(rope(), traits.switched_window),
        fixed=_SILU | _NO_BIAS,
        ignored=_ROTARY_BUFFERS,
    ),
    # Gemma Team 2024 (arXiv:2403.08295). Its files say gelu and mean its tanh form.
    "gemma": Family(
        "Gemma",
        modules=LLAMA,
        switches=_GEMMA,
        defaults=_GEMMA_FILE
        | {"num_key_value_heads": 16, "max_position_embeddings": 8192},
        traits=(traits.embed_sqrt, rope()),
        fixed=_NO_BIAS | {"use_bidirectional_attention": False},
        ignored=_ROTARY_BUFFERS,
    ),
    # Gemma Team 2024 (arXiv:2408.00118).
    "gemma2": Family(
        "Gemma2",
        modules=_with(_GEMMA2),
        switches=_GEMMA | {"norm_place": "both"},
        keys=_CAPS,
        defaults=_GEMMA2_FILE,
        traits=_GEMMA2_TRAITS,
        fixed=_NO_BIAS | {"use_bidirectional_attention": False},
    ),
    # Google 2025 (arXiv:2510.15001).
    "vaultgemma": Family(
        "VaultGemma",
        modules=_with({"mlp_norm": "pre_feedforward_layernorm"}),
        switches=_GEMMA,
        keys=_CAPS,
        defaults=_GEMMA2_FILE,
        traits=_GEMMA2_TRAITS,
        fixed=_NO_BIAS,
        score_prefix=None,
    ),
    # Gemma Team 2025 (arXiv:2503.19786).
    "gemma3_text": Family(
        "Gemma3",
        modules=_with(_GEMMA2),
        switches=_GEMMA | {"norm_place": "both", "qk_norm": True},
        keys={"final_softcap": "final_logit_softcapping"},
        defaults=_GEMMA_FILE
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304}
        | {"max_position_embeddings": 131072, "vocab_size": 262208}
        | {"intermediate_size": 9216, "num_hidden_layers": 26, "rope_theta": 1e6}
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096}
        | {"rope_local_base_freq": 10_000.0},
        traits=(
            traits.embed_sqrt,
            traits.query_scalar,
            rope(),
            traits.alternating(6, "rope_local_base_freq"),
        ),
        fixed=_NO_BIAS
        | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        # Beside images the text is one of several parts; the others are passed over.
        ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
        renamed=(
            (r"^language_model\.(?=model\.|lm_head\.)", ""),
            (r"^model\.language_model\.", "model."),
        ),
        score_prefix="Gemma3Text",
    ),
    # Abdin et al. 2024 (arXiv:2404.14219).
    "phi3": Family(
        "Phi3",
        modules=_with(
            {"attention/qkv": "self_attn.qkv_proj", "mlp/gate_up": "mlp.gate_up_proj"}
        ),
        switches={"qkv_layout": "joined", "gate_up_joined": True},
        defaults=COMMON
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": None, "bos_token_id": 1}
        | {"eos_token_id": 32000, "pad_token_id": 32000}
        | {"max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
        | {"original_max_position_embeddings": 4096},
        traits=(rope(part="partial_rotary_factor", kinds=("longrope",)), traits.window),
        fixed=_PLAIN | {"lm_head_bias": False},
    ),
    # Zhipu AI 2025, https://huggingface.co/zai-org/GLM-4-9B-0414.
    "glm4": Family(
        "Glm4",
        modules=_with(
            {"mlp/gate_up": "mlp.gate_up_proj"}
            | {"attention_post_norm": "post_self_attn_layernorm"}
            | {"mlp_post_norm": "post_mlp_layernorm"}
        ),
        switches={"norm_place": "both", "rotary_pairs": True, "gate_up_joined": True},
        defaults=COMMON
        | {"rms_norm_eps": 1.5625e-7, "num_key_value_heads": 2, "head_dim": 128}
        | {"max_position_embeddings": 131072, "partial_rotary_factor": 0.5}
        | {"attention_bias": True, "pad_token_id": 151329}
        | {"eos_token_id": [151329, 151336, 151338]},
        traits=(
            rope(part="partial_rotary_factor"),
            traits.switch("attention_bias", "qkv_bias"),
        ),
        fixed=_SILU,
    ),
    # OLMo Team 2024 (arXiv:2501.00656).
    "olmo2": Family(
        "Olmo2",
        modules=_with(
            {f"attention/{x}_all_norm": f"self_attn.{x}_norm" for x in "qk"} | _POST
        ),
        switches={"norm_place": "post", "qk_norm": "whole"},
        defaults=_RMS
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": None, "pad_token_id": 1}
        | {"eos_token_id": 50279, "max_position_embeddings": 2048},
        traits=(rope(),),
        fixed=_SILU | _NO_BIAS,
    ),
    # Hugging Face 2025, https://huggingface.co/blog/smollm3.
    "smollm3": Family(
        "SmolLM3",
        modules=LLAMA,
        defaults=_RMS
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768}
        | {"rope_theta": 2e6, "no_rope_layer_interval": 4, "tie_word_embeddings": True}
        | {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
        traits=(rope(), traits.no_rope_layers),
        fixed=_PLAIN | {"use_sliding_window": False},
    ),
    # IBM 2024, https://github.com/ibm-granite/granite-3.0-language-models.
    "granite": Family(
        "Granite",
        modules=LLAMA,
        keys={
            "embed_scale": "embedding_multiplier",
            "query_scale": "attention_multiplier",
        }
        | {"residual_scale": "residual_multiplier"},
        defaults=_RMS
        | _IDS
        | {"num_key_value_heads": None, "max_position_embeddings": 2048}
        | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0}
        | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
        traits=(rope(), traits.logits_scaling),
        fixed=_PLAIN,
        score_prefix=None,
    ),
    # Jiang et al. 2024 (arXiv:2401.04088).
    "mixtral": Family(
        "Mixtral",
        modules=_with(_MIXTRAL),
        defaults=_RMS
        | _IDS
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6}
        | {
            "max_position_embeddings": 131072,
        }
        | {"num_experts_per_tok": 2, "sliding_window": None},
        traits=(
            rope(),
            traits.window,
            traits.experts("num_local_experts", 8, normalize=True),
        ),
        fixed=_SILU,
    ),
    # Qwen Team 2024 (arXiv:2407.10671).
    "qwen2_moe": Family(
        "Qwen2Moe",
        modules=_with(_EXPERTS | _SHARED),
        keys={"intermediate_size": "moe_intermediate_size"},
        defaults=_RMS
        | {"num_key_value_heads": 16, "max_position_embeddings": 32768}
        | {"num_experts_per_tok": 4, "norm_topk_prob": False}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        | {"qkv_bias": True},
        traits=(
            rope(),
            traits.switch("qkv_bias", "qkv_bias"),
            traits.experts("num_experts", 60, shared=True),
        ),
        fixed=_SILU | {"use_sliding_window": False},
    ),
    # Qwen Team 2025 (arXiv:2505.09388).
    "qwen3_moe": Family(
        "Qwen3Moe",
        modules=_with(_EXPERTS),
        switches={"qk_norm": True},
        keys={"intermediate_size": "moe_intermediate_size"},
        defaults=_RMS
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768}
        | {"num_experts_per_tok": 8, "norm_topk_prob": False}
        | {"moe_intermediate_size": 768, "sliding_window": None},
        traits=(rope(), traits.experts("num_experts", 128)),
        fixed=_SILU | _NO_BIAS | {"use_sliding_window": False},
    ),
}
