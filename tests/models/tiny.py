"""Tiny models and checkpoints for the tests of this room."""

import jax
import numpy as np

from jalign.models import Model, ModelConfig, RopeScaling

SIZES = dict(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position=16)
YARN = RopeScaling("yarn", factor=4.0, original_max_position=16)
LINEAR = RopeScaling("linear", factor=2.0)
CONFIGS = {
    "llama": ModelConfig(**SIZES, eos_token_ids=(2,), bos_token_id=1),
    "llama3": ModelConfig(**SIZES, rope_scaling=LLAMA3, tie_embeddings=True),
    "linear": ModelConfig(**SIZES, rope_scaling=LINEAR),
    "yarn": ModelConfig(**SIZES, rope_scaling=YARN),
    "mistral": ModelConfig(**SIZES, family="mistral", sliding_window=5),
    "qwen2": ModelConfig(**SIZES, family="qwen2", qkv_bias=True),
    "qwen3": ModelConfig(**SIZES, family="qwen3", qk_norm=True),
    "reward": ModelConfig(**SIZES, num_labels=1, pad_token_id=0),
}


def random_params(model: Model, seed: int = 0):
    """Numpy-seeded params in which nothing is 0 or 1, biases and norms included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0.3, 0.3, x.shape).astype(x.dtype), model.param_shapes()
    )


def random_tokens(shape=(2, 12), seed: int = 0):
    return np.random.default_rng(seed).integers(0, 48, shape).astype(np.int32)
