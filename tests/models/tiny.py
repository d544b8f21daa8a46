"""Tiny models and checkpoints for the tests of this room."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jalign.models import Model, ModelConfig, RopeScaling
from jalign.models.config import Experts, LayerKind
from jalign.models.hf_config import config_from_hf

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
# Every switch of a config at least once: the families beside those of CONFIGS. Older
# ones have as many kv heads as heads, and heads that are as wide as the model together.
_OLD = SIZES | dict(num_kv_heads=4, head_dim=6, norm="layer", norm_eps=1e-5)
_OLD |= dict(norm_bias=True, gated=False)
_BIASES = dict(qkv_bias=True, o_bias=True, mlp_bias=True)
_TIED = dict(tie_embeddings=True)
_WIDE = dict(intermediate_size=96)  # 4 D, which the files do not say
_GEMMA = SIZES | _TIED | dict(norm_offset=True, norm_place="both")
_GEMMA |= dict(activation="gelu_tanh", embed_scale=math.sqrt(24), query_scale=7**-0.5)
LONGROPE = RopeScaling("longrope", factor=8.0, original_max_position=8)
LONGROPE = dataclasses.replace(
    LONGROPE, short_factors=(1.0, 1.5, 2.0), long_factors=(1.0, 3.0, 6.0)
)
_FAMILIES = {
    "opt": _OLD
    | _BIASES
    | _TIED
    | dict(activation="relu", positions="learned", position_offset=2, max_position=32)
    | dict(norm_place="after", final_norm=False, embed_width=16),
    "bloom": _OLD
    | _BIASES
    | _TIED
    | _WIDE
    | dict(activation="gelu_tanh", positions="alibi", qkv_layout="groups")
    | dict(embed_norm=True),
    "mpt": _OLD
    | _TIED
    | _WIDE
    | dict(num_heads=6, num_kv_heads=6, head_dim=4, norm_bias=False)
    | dict(activation="gelu", positions="alibi", alibi_max=16.0, qkv_layout="joined")
    | dict(clip_qkv=0.4, query_scale=0.3),
    "falcon": _OLD
    | _TIED
    | dict(num_kv_heads=2, activation="gelu", qkv_layout="groups", parallel_norms=2)
    | dict(alibi_rounded=True),
    "falcon_rw": _OLD
    | _BIASES
    | _TIED
    | dict(activation="gelu", positions="alibi", qkv_layout="groups")
    | dict(alibi_rounded=True),
    "gpt_neox": _OLD
    | _BIASES
    | dict(activation="gelu", qkv_layout="groups", parallel_norms=2, rotary_dim=4),
    "gptj": _OLD
    | dict(activation="gelu_tanh", mlp_bias=True, head_bias=True, parallel_norms=1)
    | dict(rotary_dim=4, rotary_pairs=True),
    "gpt2": _OLD
    | _BIASES
    | _TIED
    | dict(activation="gelu_tanh", positions="learned", qkv_layout="joined"),
    "gemma2": _GEMMA
    | dict(layer_kinds=(LayerKind(4), LayerKind()))
    | dict(attention_softcap=5.0, final_softcap=6.0),
    "gemma3_text": _GEMMA
    | dict(num_layers=3, qk_norm=True, final_softcap=6.0, rope_scaling=LINEAR)
    | dict(layer_kinds=(LayerKind(4, "local"), LayerKind(), LayerKind(4, "local")))
    | dict(rope_theta=1e5, local_rope_theta=1e4),
    "phi3": SIZES
    | dict(head_dim=6, qkv_layout="joined", gate_up_joined=True, sliding_window=5)
    | dict(rope_scaling=LONGROPE, max_position=64),
    "olmo2": SIZES | dict(norm_place="post", qk_norm="whole"),
    "smollm3": SIZES | _TIED | dict(layer_kinds=(LayerKind(), LayerKind(None, "none"))),
    "granite": SIZES
    | dict(embed_scale=3.0, query_scale=0.2, residual_scale=0.22, logit_scale=0.25),
    "qwen2_moe": SIZES
    | dict(intermediate_size=12, qkv_bias=True)
    | dict(experts=Experts(5, 2, normalize=False, shared_size=20)),
    "mixtral": SIZES | dict(intermediate_size=12, experts=Experts(5, 2)),
}
FAMILY_CONFIGS = {
    name: ModelConfig(**{"family": name.removesuffix("_rw")} | fields)
    for name, fields in _FAMILIES.items()
}
GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def golden_file(path: Path) -> dict[str, Any]:
    """The config.json of a file of scripts/make_model_golden.py."""
    return json.loads(str(np.load(path)["config"]))


# Of a family without a row above, what its golden file says.
_READ = [config_from_hf(golden_file(path)) for path in GOLDEN]
FAMILY_CONFIGS = {
    config.family: config
    for config in _READ
    if config.family not in {known.family for known in CONFIGS.values()}
} | FAMILY_CONFIGS


@functools.cache
def shapes_of(model: Model):
    """Its param_shapes, traced once."""
    return model.param_shapes()


def random_params(model: Model, seed: int = 0):
    """Numpy-seeded params in which nothing is 0 or 1, biases and norms included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0.3, 0.3, x.shape).astype(x.dtype), shapes_of(model)
    )


def random_tokens(shape=(2, 12), seed: int = 0):
    return np.random.default_rng(seed).integers(0, 48, shape).astype(np.int32)
