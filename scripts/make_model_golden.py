"""Writes tests/models/golden/*.npz: logits of transformers for tiny random models.

    python scripts/make_model_golden.py        # needs torch and transformers

A file holds config.json, tensor shapes, tokens, attention mask and float32 logits. The
weights are not stored: in sorted order of their names each is
default_rng(0).normal(0, 0.3, shape), which the test draws again.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

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


def build(prefix: str, changes: dict) -> torch.nn.Module:
    """A transformers model with this script's weights."""
    config = getattr(transformers, f"{prefix}Config")(**SIZES | changes)
    config._attn_implementation = "eager"
    kind = "ForSequenceClassification" if "num_labels" in changes else "ForCausalLM"
    config.architectures = [prefix + kind]
    model = getattr(transformers, prefix + kind)(config).eval()
    rng = np.random.default_rng(0)
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    with torch.no_grad():
        for name in sorted(state):
            draw = rng.normal(0.0, 0.3, tuple(state[name].shape)).astype("f4")
            state[name].copy_(torch.from_numpy(draw))
    model.golden_shapes = {name: list(x.shape) for name, x in state.items()}
    return model


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and attention mask [3, 12], rows of 12, 7 and 1 real tokens."""
    tokens = np.random.default_rng(1).integers(1, 48, (3, 12)).astype(np.int32)
    mask = (np.arange(12) < np.array([[12], [7], [1]])).astype(np.int32)
    return tokens * mask, mask


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tokens, mask = inputs()
    for name, (prefix, changes) in CASES.items():
        model = build(prefix, changes)
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
