"""Model families as data: switches, config keys, and what their modules are called.

Read by one interpreter in both directions (hf_config, hf_weights). To add a family, add
a row; what a tensor is stands in tensors.py, what a switch does in config.py.
Sources: transformers' configuration and modeling files of each family, by name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jalign.models import hf_traits as traits
from jalign.models.config import ModelConfig
from jalign.models.hf_traits import Trait
from jalign.models.tensors import Tensor, is_linear, kind_of, layout_of, paths_of

Modules = dict[str, str]


class Family(NamedTuple):
    """One row: how a model_type differs from llama.

    Attributes:
      prefix: of the class names in `architectures`, as Llama in LlamaForCausalLM.
      modules: path of a parameter's module (or of the parameter) -> its name in the
        file; "{}" stands for the layer, and a second one for the expert.
      switches: ModelConfig fields that the family fixes.
      keys: ModelConfig field -> key in config.json, where that is not KEYS'; "" where
        the file has none.
      defaults: config.json keys that may be absent, and their values then. Source:
        transformers' configuration classes.
      traits: keys that are worked out.
      fixed: keys that would change the computation: another value is refused.
      root: what older files leave out before all names but the head's.
      ignored: names (regex) of buffers that older exporters wrote; they hold nothing
        that is not in the config.
      transposed: its kernels have inputs first.
      score_prefix: of the class with a scalar head, where that is not `prefix`; None
        where transformers has no such class.
      variant: modules that are called otherwise in some of its models.
    """

    prefix: str
    modules: Modules
    switches: dict[str, Any] = {}
    keys: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    traits: tuple[Trait, ...] = ()
    fixed: dict[str, Any] = {}
    root: str = "model."
    ignored: tuple[str, ...] = ()
    transposed: bool = False
    score_prefix: str | None = ""
    variant: Callable[[ModelConfig], Modules] = lambda config: {}


# ModelConfig field -> key in config.json.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
    # These are checked against the vocabulary.
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
# Without these a config.json says nothing, but where a family has a default.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")


def _named(root: str, top: Modules, layer: str, inner: Modules) -> Modules:
    """Module names from those within the root and within a layer; a "/" before a name
    keeps the root away."""

    def full(name: str) -> str:
        return name[1:] if name.startswith("/") else root + name

    layers = {f"layers/{path}": full(layer + name) for path, name in inner.items()}
    return {path: full(name) for path, name in top.items()} | layers


_TOP = {"embed": "embed_tokens", "norm": "norm"}
_HEADS = {"unembed": "/lm_head", "score": "/score"}
_ATTENTION = {f"attention/{x}": f"self_attn.{x}_proj" for x in "qkvo"}
_ATTENTION |= {f"attention/{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
_MLP = {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_INNER = _ATTENTION | _MLP | _NORMS
LLAMA = _named("model.", _TOP | _HEADS, "layers.{}.", _INNER)
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
    return LLAMA | _named("model.", {}, "layers.{}.", inner)


_NEOX_LAYER = {
    "attention/qkv_groups": "query_key_value",
    "attention/o": "dense",
    "mlp/up": "mlp.dense_h_to_4h",
    "mlp/down": "mlp.dense_4h_to_h",
} | _NORMS


def _fused(attention: str) -> Modules:
    return {
        path: f"{attention}.{name}" if path.startswith("attention/") else name
        for path, name in _NEOX_LAYER.items()
    }


def _falcon_norms(config: ModelConfig) -> Modules:
    if config.parallel_norms != 2:
        return {}
    names = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
    return _named("transformer.", {}, "h.{}.", names)


_COMMON = {
    "tie_word_embeddings": False,
    "head_dim": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_RMS = _COMMON | {"rms_norm_eps": 1e-6}
_ROTARY_BUFFERS = (r".*\.self_attn\.rotary_emb\.inv_freq",)
_MASK_BUFFERS = (r".*\.attn\.(bias|masked_bias)",)
_SILU = {"hidden_act": "silu"}
_NO_BIAS = {"attention_bias": False}
_PLAIN = _SILU | _NO_BIAS | {"mlp_bias": False}
_QWEN = _RMS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# LayerNorm, and a plain MLP that has biases.
_OLD = {"norm": "layer", "norm_bias": True, "gated": False, "mlp_bias": True}
_BIASES = {"qkv_bias": True, "o_bias": True}
_NONE = dict.fromkeys(("num_kv_heads", "head_dim"), "")
_GEMMA = {"norm_offset": True, "activation": "gelu_tanh"}
_GEMMA_FILE = _RMS | {"tie_word_embeddings": True, "head_dim": 256}
_GEMMA_FILE |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_CAPS = {
    "attention_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
}
_GPT2_KEYS = _NONE | {"hidden_size": "n_embd", "num_layers": "n_layer"}
_GPT2_KEYS |= {"num_heads": "n_head", "max_position": "n_positions"}
_GPT2_KEYS |= {"intermediate_size": "n_inner", "norm_eps": "layer_norm_epsilon"}
_GPT2_FILE = _COMMON | {"layer_norm_epsilon": 1e-5, "n_inner": None}
_GPT2_FILE |= {"bos_token_id": 50256, "eos_token_id": 50256}
_GPT2_FILE |= {"activation_function": "gelu_new"}

FAMILIES = {
    "llama": Family(
        "Llama",
        LLAMA,
        {},
        {},
        _RMS | _IDS | {"num_key_value_heads": None, "max_position_embeddings": 2048},
        (traits.rope(),),
        _PLAIN,
        ignored=_ROTARY_BUFFERS,
    ),
    "mistral": Family(
        "Mistral",
        LLAMA,
        {},
        {},
        _RMS
        | _IDS
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"sliding_window": 4096},
        (traits.rope(), traits.window),
        _SILU,
        ignored=_ROTARY_BUFFERS,
    ),
    "qwen2": Family(
        "Qwen2",
        LLAMA,
        {"qkv_bias": True},
        {},
        _QWEN,
        (traits.rope(), traits.switched_window),
        _SILU,
        ignored=_ROTARY_BUFFERS,
    ),
    "qwen3": Family(
        "Qwen3",
        LLAMA,
        {"qk_norm": True},
        {},
        _QWEN | {"head_dim": 128},
        (traits.rope(), traits.switched_window),
        _SILU | _NO_BIAS,
        ignored=_ROTARY_BUFFERS,
    ),
    # Zhang et al. 2022 (arXiv:2205.01068).
    "opt": Family(
        "OPT",
        _named(
            "model.decoder.",
            {
                "embed": "embed_tokens",
                "positions": "embed_positions",
                "project_in": "project_in",
                "project_out": "project_out",
                "norm": "final_layer_norm",
            }
            | _HEADS,
            "layers.{}.",
            {f"attention/{x}": f"self_attn.{x}_proj" for x in "qkv"}
            | {"attention/o": "self_attn.out_proj", "mlp/up": "fc1", "mlp/down": "fc2"}
            | {
                "attention_norm": "self_attn_layer_norm",
                "mlp_norm": "final_layer_norm",
            },
        ),
        _OLD | {"positions": "learned", "position_offset": 2, "norm_eps": 1e-5},
        _NONE | {"intermediate_size": "ffn_dim", "norm_eps": ""},
        _COMMON
        | {"tie_word_embeddings": True, "max_position_embeddings": 2048}
        | {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "enable_bias": True}
        | {"word_embed_proj_dim": None, "do_layer_norm_before": True}
        | {"activation_function": "relu"},
        (
            traits.opt,
            traits.switch("enable_bias", "qkv_bias", "o_bias", "mlp_bias"),
            traits.activation("activation_function"),
        ),
        {"layer_norm_elementwise_affine": True},
        "model.",
    ),
    # BigScience 2022 (arXiv:2211.05100).
    "bloom": Family(
        "Bloom",
        _named(
            "transformer.",
            {"embed": "word_embeddings", "embed_norm": "word_embeddings_layernorm"}
            | {"norm": "ln_f"}
            | _HEADS,
            "h.{}.",
            _fused("self_attention"),
        ),
        _OLD
        | _BIASES
        | {"positions": "alibi", "embed_norm": True, "qkv_layout": "groups"}
        | {"activation": "gelu_tanh"},
        _NONE
        | {"num_layers": "n_layer", "num_heads": "n_head", "intermediate_size": ""}
        | {"norm_eps": "layer_norm_epsilon", "max_position": ""},
        _COMMON | _IDS | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
        fixed={"apply_residual_connection_post_layernorm": False},
        root="transformer.",
    ),
    # MosaicML 2023, https://www.databricks.com/blog/mpt-7b.
    "mpt": Family(
        "Mpt",
        _named(
            "transformer.",
            {"embed": "wte", "norm": "norm_f"} | _HEADS,
            "blocks.{}.",
            {"attention/qkv": "attn.Wqkv", "attention/o": "attn.out_proj"}
            | {"mlp/up": "ffn.up_proj", "mlp/down": "ffn.down_proj"}
            | {"attention_norm": "norm_1", "mlp_norm": "norm_2"},
        ),
        {"norm": "layer", "gated": False, "activation": "gelu", "positions": "alibi"}
        | {"qkv_layout": "joined"},
        _NONE
        | {"hidden_size": "d_model", "num_layers": "n_layers", "num_heads": "n_heads"}
        | {"intermediate_size": "", "norm_eps": "layer_norm_epsilon"}
        | {"max_position": "max_seq_len"},
        _COMMON
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5}
        | {"max_seq_len": 2048},
        (traits.mpt,),
        {"expansion_ratio": 4, "no_bias": True, "logit_scale": None},
        "transformer.",
    ),
    # Almazrouei et al. 2023 (arXiv:2311.16867).
    "falcon": Family(
        "Falcon",
        _named(
            "transformer.",
            {"embed": "word_embeddings", "norm": "ln_f"} | _HEADS,
            "h.{}.",
            _fused("self_attention"),
        ),
        {"norm": "layer", "norm_bias": True, "gated": False, "qkv_layout": "groups"}
        | {"alibi_rounded": True},
        _NONE
        | {"intermediate_size": "ffn_hidden_size", "norm_eps": "layer_norm_epsilon"},
        _COMMON
        | {"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "bias": False}
        | {"new_decoder_architecture": False, "multi_query": True, "alibi": False}
        | {"parallel_attn": True, "bos_token_id": 11, "eos_token_id": 11}
        | {"ffn_hidden_size": None, "max_position_embeddings": 2048}
        | {"activation": "gelu"},
        (
            traits.falcon,
            traits.switch("bias", "qkv_bias", "o_bias", "mlp_bias"),
            traits.activation("activation"),
            traits.rope(),
        ),
        {"apply_residual_connection_post_layernorm": False},
        "transformer.",
        variant=_falcon_norms,
    ),
    # Black et al. 2022 (arXiv:2204.06745), Biderman et al. 2023 (arXiv:2304.01373).
    "gpt_neox": Family(
        "GPTNeoX",
        _named(
            "gpt_neox.",
            {"embed": "embed_in", "norm": "final_layer_norm"}
            | _HEADS
            | {"unembed": "/embed_out"},
            "layers.{}.",
            _fused("attention"),
        ),
        _OLD | {"qkv_layout": "groups"},
        _NONE | {"norm_eps": "layer_norm_eps"},
        _COMMON
        | {"layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2}
        | {"rotary_pct": 0.25, "rotary_emb_base": 10_000, "attention_bias": True}
        | {"use_parallel_residual": True, "max_position_embeddings": 2048}
        | {"hidden_act": "gelu"},
        (
            traits.parallel,
            traits.switch("attention_bias", "qkv_bias", "o_bias"),
            traits.activation(),
            traits.rope("rotary_emb_base", "rotary_pct"),
        ),
        root="gpt_neox.",
        ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
    # Wang and Komatsuzaki 2021, https://github.com/kingoflolz/mesh-transformer-jax.
    "gptj": Family(
        "GPTJ",
        _named(
            "transformer.",
            {"embed": "wte", "norm": "ln_f"} | _HEADS,
            "h.{}.",
            {f"attention/{x}": f"attn.{x}_proj" for x in "qkv"}
            | {"attention/o": "attn.out_proj", "attention_norm": "ln_1"}
            | {"mlp/up": "mlp.fc_in", "mlp/down": "mlp.fc_out"},
        ),
        _OLD | {"parallel_norms": 1, "head_bias": True, "rotary_pairs": True},
        _GPT2_KEYS | {"rotary_dim": "rotary_dim"},
        _GPT2_FILE | {"n_positions": 2048, "rotary_dim": 64},
        (traits.activation("activation_function"),),
        root="transformer.",
        ignored=_MASK_BUFFERS,
    ),
    # Radford et al. 2019, "Language models are unsupervised multitask learners".
    "gpt2": Family(
        "GPT2",
        _named(
            "transformer.",
            {"embed": "wte", "positions": "wpe", "norm": "ln_f"} | _HEADS,
            "h.{}.",
            {"attention/qkv": "attn.c_attn", "attention/o": "attn.c_proj"}
            | {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
            | {"mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj"},
        ),
        _OLD | _BIASES | {"positions": "learned", "qkv_layout": "joined"},
        _GPT2_KEYS,
        _GPT2_FILE | {"tie_word_embeddings": True, "n_positions": 1024},
        (traits.activation("activation_function"),),
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        | {"add_cross_attention": False},
        "transformer.",
        ignored=_MASK_BUFFERS,
        transposed=True,
    ),
    # Gemma Team 2024 (arXiv:2403.08295). Its files say gelu and mean its tanh form.
    "gemma": Family(
        "Gemma",
        LLAMA,
        _GEMMA,
        {},
        _GEMMA_FILE | {"num_key_value_heads": 16, "max_position_embeddings": 8192},
        (traits.embed_sqrt, traits.rope()),
        _NO_BIAS | {"use_bidirectional_attention": False},
        ignored=_ROTARY_BUFFERS,
    ),
    # Gemma Team 2024 (arXiv:2408.00118).
    "gemma2": Family(
        "Gemma2",
        _with(_GEMMA2),
        _GEMMA | {"norm_place": "both"},
        _CAPS,
        _GEMMA_FILE
        | {"num_key_value_heads": 4, "max_position_embeddings": 8192}
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        (
            traits.embed_sqrt,
            traits.query_scalar,
            traits.rope(),
            traits.alternating(2),
        ),
        _NO_BIAS | {"use_bidirectional_attention": False},
    ),
    # Gemma Team 2025 (arXiv:2503.19786).
    "gemma3_text": Family(
        "Gemma3",
        _with(_GEMMA2),
        _GEMMA | {"norm_place": "both", "qk_norm": True},
        {"final_softcap": "final_logit_softcapping"},
        _GEMMA_FILE
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304}
        | {"max_position_embeddings": 131072, "vocab_size": 262208}
        | {"intermediate_size": 9216, "num_hidden_layers": 26, "rope_theta": 1e6}
        | {"query_pre_attn_scalar": 256, "sliding_window": 4096}
        | {"rope_local_base_freq": 10_000.0},
        (
            traits.embed_sqrt,
            traits.query_scalar,
            traits.rope(),
            traits.alternating(6, "rope_local_base_freq"),
        ),
        _NO_BIAS
        | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        score_prefix="Gemma3Text",
    ),
    # Abdin et al. 2024 (arXiv:2404.14219).
    "phi3": Family(
        "Phi3",
        _with(
            {"attention/qkv": "self_attn.qkv_proj", "mlp/gate_up": "mlp.gate_up_proj"}
        ),
        {"qkv_layout": "joined", "gate_up_joined": True},
        {},
        _COMMON
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": None, "bos_token_id": 1}
        | {"eos_token_id": 32000, "pad_token_id": 32000}
        | {"max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
        | {"original_max_position_embeddings": 4096},
        (traits.rope(part="partial_rotary_factor", kinds=("longrope",)), traits.window),
        _PLAIN | {"lm_head_bias": False},
    ),
    # OLMo Team 2024 (arXiv:2501.00656).
    "olmo2": Family(
        "Olmo2",
        _with({f"attention/{x}_all_norm": f"self_attn.{x}_norm" for x in "qk"} | _POST),
        {"norm_place": "post", "qk_norm": "whole"},
        {},
        _RMS
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": None, "pad_token_id": 1}
        | {"eos_token_id": 50279, "max_position_embeddings": 2048},
        (traits.rope(),),
        _SILU | _NO_BIAS,
    ),
    # Hugging Face 2025, https://huggingface.co/blog/smollm3.
    "smollm3": Family(
        "SmolLM3",
        LLAMA,
        {},
        {},
        _RMS
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768}
        | {"rope_theta": 2e6, "no_rope_layer_interval": 4, "tie_word_embeddings": True}
        | {"bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
        (traits.rope(), traits.no_rope_layers),
        _PLAIN | {"use_sliding_window": False},
    ),
    # IBM 2024, https://github.com/ibm-granite/granite-3.0-language-models.
    "granite": Family(
        "Granite",
        LLAMA,
        {},
        {"embed_scale": "embedding_multiplier", "query_scale": "attention_multiplier"}
        | {"residual_scale": "residual_multiplier"},
        _RMS
        | _IDS
        | {"num_key_value_heads": None, "max_position_embeddings": 2048}
        | {"embedding_multiplier": 1.0, "attention_multiplier": 1.0}
        | {"residual_multiplier": 1.0, "logits_scaling": 1.0},
        (traits.rope(), traits.logits_scaling),
        _PLAIN,
        score_prefix=None,
    ),
    # Jiang et al. 2024 (arXiv:2401.04088).
    "mixtral": Family(
        "Mixtral",
        _with(_MIXTRAL),
        {},
        {},
        _RMS
        | _IDS
        | {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6}
        | {
            "max_position_embeddings": 131072,
        }
        | {"num_experts_per_tok": 2, "sliding_window": None},
        (
            traits.rope(),
            traits.window,
            traits.experts("num_local_experts", 8, normalize=True),
        ),
        _SILU,
    ),
    # Qwen Team 2024 (arXiv:2407.10671).
    "qwen2_moe": Family(
        "Qwen2Moe",
        _with(_EXPERTS | _SHARED),
        {},
        {"intermediate_size": "moe_intermediate_size"},
        _RMS
        | {"num_key_value_heads": 16, "max_position_embeddings": 32768}
        | {"num_experts_per_tok": 4, "norm_topk_prob": False}
        | {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
        | {"qkv_bias": True},
        (
            traits.rope(),
            traits.switch("qkv_bias", "qkv_bias"),
            traits.experts("num_experts", 60, shared=True),
        ),
        _SILU | {"use_sliding_window": False},
    ),
    # Qwen Team 2025 (arXiv:2505.09388).
    "qwen3_moe": Family(
        "Qwen3Moe",
        _with(_EXPERTS),
        {"qk_norm": True},
        {"intermediate_size": "moe_intermediate_size"},
        _RMS
        | {"num_key_value_heads": 4, "max_position_embeddings": 32768}
        | {"num_experts_per_tok": 8, "norm_topk_prob": False}
        | {"moe_intermediate_size": 768, "sliding_window": None},
        (traits.rope(), traits.experts("num_experts", 128)),
        _SILU | _NO_BIAS | {"use_sliding_window": False},
    ),
}


def keys_of(family: str) -> dict[str, str]:
    """ModelConfig field -> key in config.json."""
    merged = KEYS | FAMILIES[family].keys
    return {field: key for field, key in merged.items() if key}


def tensors_of(config: ModelConfig) -> tuple[Tensor, ...]:
    """The tensors of a model of this config, in the order of a checkpoint."""
    family = FAMILIES[config.family]
    return tuple(
        Tensor(
            _name(config, family, path),
            path,
            layout_of(path, family.transposed and is_linear(path)),
        )
        for path in paths_of(config)
    )


def _name(config: ModelConfig, family: Family, path: str) -> str:
    modules = family.modules | family.variant(config)
    module = path if path in modules else path.rpartition("/")[0]
    return modules[module] + (".bias" if kind_of(path) == "bias" else ".weight")


def tied_names(config: ModelConfig) -> tuple[str, str]:
    """(the copy of a tied embedding that some exporters write, the embedding)."""
    modules = FAMILIES[config.family].modules
    return modules["unembed"] + ".weight", modules["embed"] + ".weight"


def architecture_of(config: ModelConfig) -> str:
    """The transformers class that reads this model."""
    family = FAMILIES[config.family]
    if not config.num_labels:
        return family.prefix + "ForCausalLM"
    if family.score_prefix is None:
        raise ValueError(
            f"transformers has no class for a {config.family} model with a scalar head"
        )
    return (family.score_prefix or family.prefix) + "ForSequenceClassification"
