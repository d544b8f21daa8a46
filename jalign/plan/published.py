"""Published models by name: the config.json of each, as far as sizes go.

So that `jalign plan` needs neither a hub nor a download. V, D, F, L, N, K are
vocabulary, hidden size, MLP width, layers, heads, kv heads. Sources: their cards, and
the papers in docs/models.md; tests count their parameters.
"""

from typing import Any

from jalign.models.families import keys_of

_FIELDS = ("vocab_size", "hidden_size", "intermediate_size")
_FIELDS += ("num_layers", "num_heads", "num_kv_heads")


def _sizes(family: str, *sizes: int, **more: Any) -> dict[str, Any]:
    """A config.json: V, D, F, L, N, K, in the keys of a family that has them."""
    keys = keys_of(family)
    pairs = zip(_FIELDS, sizes, strict=False)
    named = {keys[field]: size for field, size in pairs if field in keys}
    return {"model_type": family} | named | more


_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}
_LLAMA2 = {"max_position_embeddings": 4096}
_LLAMA3 = {"max_position_embeddings": 131072, "rope_theta": 5e5}
_H128 = {"head_dim": 128}
_PYTHIA = {"eos_token_id": 0}
_NEW = {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 8}
_MOE = {"norm_topk_prob": True, "head_dim": 128, "num_experts_per_tok": 8}
_OLMO2 = {"rope_theta": 5e5, "max_position_embeddings": 4096}
_GRANITE = {"logits_scaling": 16, "embedding_multiplier": 12}
_PHI4_MINI = {"partial_rotary_factor": 0.75, "bos_token_id": 199999}
_PHI4_MINI |= {"eos_token_id": 199999, "pad_token_id": 199999} | _TIED
_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
_RW |= {"bos_token_id": 1, "eos_token_id": 2}
_OPT350 = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
_SHARED = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
_G3_SMALL = {"sliding_window": 512, "max_position_embeddings": 32768}
_G3 = {"sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8}}
_G3_27 = _H128 | {"query_pre_attn_scalar": 168}
_SMOLLM3 = {"rope_theta": 5e6, "max_position_embeddings": 65536}

PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-2-7b": _sizes("llama", 32000, 4096, 11008, 32, 32, **_LLAMA2),
    "llama-2-13b": _sizes("llama", 32000, 5120, 13824, 40, 40, **_LLAMA2),
    "llama-2-70b": _sizes("llama", 32000, 8192, 28672, 80, 64, 8, **_LLAMA2),
    "llama-3.1-8b": _sizes("llama", 128256, 4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama-3.1-70b": _sizes("llama", 128256, 8192, 28672, 80, 64, 8, **_LLAMA3),
    "llama-3.1-405b": _sizes("llama", 128256, 16384, 53248, 126, 128, 8, **_LLAMA3),
    "llama-3.2-1b": _sizes("llama", 128256, 2048, 8192, 16, 32, 8, **_LLAMA3 | _TIED),
    "llama-3.2-3b": _sizes("llama", 128256, 3072, 8192, 28, 24, 8, **_LLAMA3 | _TIED),
    "mistral-7b": _sizes("mistral", 32000, 4096, 14336, 32, 32, 8),
    "mixtral-8x7b": _sizes("mixtral", 32000, 4096, 14336, 32, 32, 8),
    "mixtral-8x22b": _sizes("mixtral", 32768, 6144, 16384, 56, 48, 8),
    "qwen2.5-0.5b": _sizes("qwen2", 151936, 896, 4864, 24, 14, 2, **_TIED),
    "qwen2.5-1.5b": _sizes("qwen2", 151936, 1536, 8960, 28, 12, 2, **_TIED),
    "qwen2.5-3b": _sizes("qwen2", 151936, 2048, 11008, 36, 16, 2, **_TIED),
    "qwen2.5-7b": _sizes("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _sizes("qwen2", 152064, 5120, 13824, 48, 40, 8),
    "qwen2.5-32b": _sizes("qwen2", 152064, 5120, 27648, 64, 40, 8),
    "qwen2.5-72b": _sizes("qwen2", 152064, 8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _sizes("qwen3", 151936, 1024, 3072, 28, 16, 8, **_H128 | _TIED),
    "qwen3-1.7b": _sizes("qwen3", 151936, 2048, 6144, 28, 16, 8, **_H128 | _TIED),
    "qwen3-4b": _sizes("qwen3", 151936, 2560, 9728, 36, 32, 8, **_H128 | _TIED),
    "qwen3-8b": _sizes("qwen3", 151936, 4096, 12288, 36, 32, 8, **_H128),
    "qwen3-14b": _sizes("qwen3", 151936, 5120, 17408, 40, 40, 8, **_H128),
    "qwen3-32b": _sizes("qwen3", 151936, 5120, 25600, 64, 64, 8, **_H128),
    "qwen1.5-moe-a2.7b": _sizes("qwen2_moe", 151936, 2048, 1408, 24, 16, 16, **_SHARED),
    "qwen3-30b-a3b": _sizes("qwen3_moe", 151936, 2048, 768, 48, 32, 4, **_MOE),
    "qwen3-235b-a22b": _sizes("qwen3_moe", 151936, 4096, 1536, 94, 64, 4, **_MOE),
    "opt-125m": _sizes("opt", 50272, 768, 3072, 12, 12),
    "opt-350m": _sizes("opt", 50272, 1024, 4096, 24, 16, **_OPT350),
    "opt-1.3b": _sizes("opt", 50272, 2048, 8192, 24, 32),
    "opt-2.7b": _sizes("opt", 50272, 2560, 10240, 32, 32),
    "opt-6.7b": _sizes("opt", 50272, 4096, 16384, 32, 32),
    "opt-13b": _sizes("opt", 50272, 5120, 20480, 40, 40),
    "opt-30b": _sizes("opt", 50272, 7168, 28672, 48, 56),
    "opt-66b": _sizes("opt", 50272, 9216, 36864, 64, 72),
    "bloom-560m": _sizes("bloom", 250880, 1024, 0, 24, 16),
    "bloom-1b7": _sizes("bloom", 250880, 2048, 0, 24, 16),
    "bloom-7b1": _sizes("bloom", 250880, 4096, 0, 30, 32),
    "bloom-176b": _sizes("bloom", 250880, 14336, 0, 70, 112),
    "mpt-7b": _sizes("mpt", 50432, 4096, 0, 32, 32),
    "mpt-30b": _sizes("mpt", 50432, 7168, 0, 48, 64, max_seq_len=8192),
    "falcon-7b": _sizes("falcon", 65024, 4544, 18176, 32, 71),
    "falcon-40b": _sizes("falcon", 65024, 8192, 32768, 60, 128, **_NEW),
    "falcon-180b": _sizes("falcon", 65024, 14848, 59392, 80, 232, **_NEW),
    "falcon-rw-1b": _sizes("falcon", 50304, 2048, 8192, 24, 32, **_RW),
    "falcon-11b": _sizes(
        *("falcon", 65024, 4096, 16384, 60, 32),
        **_NEW | _UNTIED | {"num_ln_in_parallel_attn": 1},
    ),
    "pythia-70m": _sizes("gpt_neox", 50304, 512, 2048, 6, 8, **_PYTHIA),
    "pythia-160m": _sizes("gpt_neox", 50304, 768, 3072, 12, 12, **_PYTHIA),
    "pythia-410m": _sizes("gpt_neox", 50304, 1024, 4096, 24, 16, **_PYTHIA),
    "pythia-1b": _sizes("gpt_neox", 50304, 2048, 8192, 16, 8, **_PYTHIA),
    "pythia-1.4b": _sizes("gpt_neox", 50304, 2048, 8192, 24, 16, **_PYTHIA),
    "pythia-2.8b": _sizes("gpt_neox", 50304, 2560, 10240, 32, 32, **_PYTHIA),
    "pythia-6.9b": _sizes("gpt_neox", 50432, 4096, 16384, 32, 32, **_PYTHIA),
    "pythia-12b": _sizes("gpt_neox", 50688, 5120, 20480, 36, 40, **_PYTHIA),
    "gpt-neox-20b": _sizes("gpt_neox", 50432, 6144, 24576, 44, 64),
    "dolly-v2-12b": _sizes("gpt_neox", 50280, 5120, 20480, 36, 40, **_PYTHIA),
    "gpt-j-6b": _sizes("gptj", 50400, 4096, 16384, 28, 16),
    "gpt2": _sizes("gpt2", 50257, 768, 3072, 12, 12),
    "gpt2-medium": _sizes("gpt2", 50257, 1024, 4096, 24, 16),
    "gpt2-large": _sizes("gpt2", 50257, 1280, 5120, 36, 20),
    "gpt2-xl": _sizes("gpt2", 50257, 1600, 6400, 48, 25),
    "gemma-2b": _sizes("gemma", 256000, 2048, 16384, 18, 8, 1),
    "gemma-7b": _sizes("gemma", 256000, 3072, 24576, 28, 16, 16),
    "gemma-2-2b": _sizes("gemma2", 256000, 2304, 9216, 26, 8, 4),
    "gemma-2-9b": _sizes("gemma2", 256000, 3584, 14336, 42, 16, 8),
    "gemma-2-27b": _sizes(
        *("gemma2", 256000, 4608, 36864, 46, 32, 16),
        **_H128 | {"query_pre_attn_scalar": 144},
    ),
    "gemma-3-270m": _sizes("gemma3_text", 262144, 640, 2048, 18, 4, 1, **_G3_SMALL),
    "gemma-3-1b": _sizes("gemma3_text", 262144, 1152, 6912, 26, 4, 1, **_G3_SMALL),
    "gemma-3-4b": _sizes("gemma3_text", 262208, 2560, 10240, 34, 8, 4, **_G3),
    "gemma-3-12b": _sizes("gemma3_text", 262208, 3840, 15360, 48, 16, 8, **_G3),
    "gemma-3-27b": _sizes(
        "gemma3_text", 262208, 5376, 21504, 62, 32, 16, **_G3 | _G3_27
    ),
    "phi-3-mini": _sizes("phi3", 32064, 3072, 8192, 32, 32, 32),
    "phi-3-medium": _sizes("phi3", 32064, 5120, 17920, 40, 40, 10),
    "phi-4": _sizes("phi3", 100352, 5120, 17920, 40, 40, 10),
    "phi-4-mini": _sizes("phi3", 200064, 3072, 8192, 32, 24, 8, **_PHI4_MINI),
    "olmo-2-1b": _sizes("olmo2", 100352, 2048, 8192, 16, 16, **_OLMO2),
    "olmo-2-7b": _sizes("olmo2", 100352, 4096, 11008, 32, 32, **_OLMO2),
    "olmo-2-13b": _sizes("olmo2", 100352, 5120, 13824, 40, 40, **_OLMO2),
    "olmo-2-32b": _sizes("olmo2", 100352, 5120, 27648, 64, 40, 8, **_OLMO2),
    "smollm3-3b": _sizes("smollm3", 128256, 2048, 11008, 36, 16, 4, **_SMOLLM3),
    "granite-3.1-8b": _sizes(
        "granite", 49155, 4096, 12800, 40, 32, 8, **_GRANITE | _TIED
    ),
}
