"""Writes tests/models/golden/*.npz: logits of transformers for tiny random models.

    python scripts/make_model_golden.py [CASE...]   # all, or those; needs torch

A file holds config.json, tensor shapes, tokens, attention mask and float32 logits. The
weights are not stored: in sorted order of their names in model.safetensors each is
default_rng(0).normal(0, 0.3, shape), which the test draws again.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "models" / "golden"
SIZES = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    pad_token_id=0,
)
LLAMA3 = dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=16)
LLAMA3 |= dict(low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
YARN |= dict(rope_theta=1e4)
LINEAR = dict(rope_type="linear", factor=2.0, rope_theta=1e4)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=0)
CASES = {
    "llama": ("Llama", dict()),
    "llama_tied": ("Llama", dict(tie_word_embeddings=True)),
    "llama3_rope": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama_linear": ("Llama", dict(rope_parameters=LINEAR)),
    "llama_yarn": ("Llama", dict(rope_parameters=YARN)),
    "llama_reward": ("Llama", dict(num_labels=1)),
    "mistral_window": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, head_dim=6, hidden_size=24)),
    "qwen2_window": ("Qwen2", dict(head_dim=6) | WINDOW),
    "qwen3": ("Qwen3", dict()),
    "qwen3_reward": ("Qwen3", dict(num_labels=1)),
}
NEOX = dict(rotary_pct=0.67, use_parallel_residual=True, head_dim=6)
PHI3 = dict(sliding_window=None, original_max_position_embeddings=8)
LONG = dict(rope_type="longrope", rope_theta=1e4)
LONG |= dict(short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 6.0])
GEMMA2 = dict(query_pre_attn_scalar=7, sliding_window=4, attn_logit_softcapping=5.0)
GEMMA2 |= dict(final_logit_softcapping=6.0)
GEMMA3 = dict(query_pre_attn_scalar=7, sliding_window=4, num_hidden_layers=3)
GEMMA3 |= dict(
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": dict(rope_type="linear", factor=2.0, rope_theta=1e5),
        "sliding_attention": dict(rope_type="default", rope_theta=1e4),
    },
)
GLM4 = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.67)
GLM4 = dict(head_dim=6, rope_parameters=GLM4)
GRANITE = dict(embedding_multiplier=3.0, attention_multiplier=0.2)
GRANITE |= dict(residual_multiplier=0.22, logits_scaling=4.0)
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12)
FALCON = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=24)
MPT = dict(d_model=24, n_layers=2, n_heads=6, max_seq_len=64, vocab_size=48)
CASES |= {
    "opt": ("OPT", dict(ffn_dim=40)),
    "opt_350m": (
        "OPT",
        dict(ffn_dim=40, do_layer_norm_before=False, word_embed_proj_dim=16),
    ),
    "opt_no_bias": ("OPT", dict(ffn_dim=40, enable_bias=False)),
    "opt_reward": (
        "OPT",
        dict(ffn_dim=40, word_embed_proj_dim=16, num_labels=1),
    ),
    "bloom": ("Bloom", dict(num_attention_heads=6)),
    "bloom_reward": ("Bloom", dict(num_labels=1)),
    "mpt": ("Mpt", MPT),
    "mpt_clip": (
        "Mpt",
        MPT | dict(attn_config=dict(clip_qkv=0.4, softmax_scale=0.3)),
    ),
    "falcon_7b": ("Falcon", FALCON),
    "falcon_40b": (
        "Falcon",
        FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, multi_query=False),
    ),
    "falcon_11b": (
        "Falcon",
        FALCON
        | dict(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False)
        | dict(num_ln_in_parallel_attn=1, ffn_hidden_size=32),
    ),
    "falcon_rw": (
        "Falcon",
        FALCON
        | dict(alibi=True, multi_query=False, parallel_attn=False, bias=True)
        | dict(num_attention_heads=6),
    ),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_sequential": (
        "GPTNeoX",
        NEOX | dict(use_parallel_residual=False, attention_bias=False),
    ),
    "gpt_neox_reward": ("GPTNeoX", NEOX | dict(num_labels=1)),
    "gptj": ("GPTJ", dict(rotary_dim=4, n_inner=40)),
    "gpt2": ("GPT2", dict(n_inner=40)),
    "gpt2_reward": ("GPT2", dict(num_labels=1)),
    "gemma": ("Gemma", dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2", GEMMA2),
    "gemma2_reward": ("Gemma2", GEMMA2 | dict(num_labels=1)),
    "vaultgemma": ("VaultGemma", GEMMA2),
    "gemma3": ("Gemma3", GEMMA3),
    "phi3": ("Phi3", PHI3 | dict(head_dim=6, sliding_window=5)),
    "phi3_long": ("Phi3", PHI3 | dict(head_dim=6, rope_parameters=LONG)),
    "phi4_mini": (
        "Phi3",
        PHI3
        | dict(head_dim=6, tie_word_embeddings=True)
        | dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.67)),
    ),
    "glm4": ("Glm4", GLM4),
    "glm4_no_bias": ("Glm4", GLM4 | dict(attention_bias=False)),
    "glm4_reward": ("Glm4", GLM4 | dict(num_labels=1)),
    "olmo2": ("Olmo2", dict(head_dim=6)),
    "smollm3": ("SmolLM3", dict(head_dim=6, no_rope_layers=[1, 0])),
    "granite": ("Granite", GRANITE | dict(head_dim=6)),
    "mixtral": ("Mixtral", dict(num_local_experts=5, sliding_window=None)),
    "qwen2_moe": (
        "Qwen2Moe",
        MOE | dict(shared_expert_intermediate_size=20, head_dim=6),
    ),
    "qwen3_moe": ("Qwen3Moe", MOE | dict(norm_topk_prob=True)),
    "qwen2_some_windows": (
        "Qwen2",
        dict(head_dim=6) | WINDOW | dict(max_window_layers=1),
    ),
}
# Every switch at least once; `make parity` compares all cases.
GOLDEN = """
llama llama_tied llama3_rope llama_linear llama_yarn llama_reward mistral_window
qwen2 qwen2_window qwen3 qwen3_reward opt_350m bloom mpt_clip falcon_40b falcon_rw
gpt_neox gptj gpt2 gemma2 gemma3 phi4_mini olmo2 smollm3 granite qwen2_moe mixtral
opt_reward glm4 vaultgemma
""".split()
IDS = dict(bos_token_id=1, eos_token_id=2)
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SHARED += ("max_position_embeddings", "pad_token_id")
TEXT_CONFIGS = {"Gemma3": "Gemma3Text"}
# What a case keeps of SIZES, where the family has not all of it.
OTHER_KEYS = ("Mpt", "Falcon", "Bloom", "GPT2", "GPTJ", "OPT")


def build(prefix: str, changes: dict) -> Any:
    """A transformers model with this script's weights."""
    import transformers  # here, so that the tests read GOLDEN without torch

    name = TEXT_CONFIGS.get(prefix, prefix)
    sizes = {k: v for k, v in SIZES.items() if prefix not in OTHER_KEYS or k in SHARED}
    config = getattr(transformers, f"{name}Config")(**IDS | sizes | changes)
    config._attn_implementation = "sdpa" if changes.get("alibi") else "eager"
    kind = "ForSequenceClassification" if "num_labels" in changes else "ForCausalLM"
    kind = "LMHeadModel" if (prefix, kind) == ("GPT2", "ForCausalLM") else kind
    if "num_labels" in changes:
        prefix = name
    config.architectures = [prefix + kind]
    model = getattr(transformers, prefix + kind)(config)
    attention = config._attn_implementation
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder, "model.safetensors")
        shapes = {name: list(x.shape) for name, x in load_file(file).items()}
        rng = np.random.default_rng(0)
        draws = {
            n: rng.normal(0.0, 0.3, shapes[n]).astype("f4") for n in sorted(shapes)
        }
        save_file(draws, file, metadata={"format": "pt"})
        model = type(model).from_pretrained(folder, attn_implementation=attention)
    model.name_or_path = model.config.name_or_path = ""  # the folder is gone
    model.golden_shapes = shapes
    return model.eval()


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and attention mask [3, 12], rows of 12, 7 and 1 real tokens."""
    tokens = np.random.default_rng(1).integers(1, 48, (3, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array([[12], [7], [1]])).astype(np.int32)
    return tokens * mask, mask


def main() -> None:
    import torch

    unknown = set(sys.argv[1:]) - set(GOLDEN)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: not in GOLDEN, {', '.join(GOLDEN)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokens, mask = inputs()
    for name in sys.argv[1:] or GOLDEN:
        model = build(*CASES[name])
        with torch.no_grad():
            out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask))
        np.savez_compressed(
            FOLDER / f"{name}.npz",
            config=json.dumps(model.config.to_dict(), default=str),
            shapes=json.dumps(model.golden_shapes),
            tokens=tokens,
            attention_mask=mask,
            logits=out.logits.float().numpy(),
        )


if __name__ == "__main__":
    main()
