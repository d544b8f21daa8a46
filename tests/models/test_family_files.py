"""Families in their files: round trips, and what is refused by name."""

import jax
import numpy as np
import pytest

from jalign.models import Model, load, save
from jalign.models.hf_config import config_from_hf, config_to_hf
from tests.models.tiny import FAMILY_CONFIGS, random_params

# Keys of published classes whose other values no published checkpoint has.
REFUSED = [
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("falcon", {"apply_residual_connection_post_layernorm": True}),
    ("mpt", {"attn_config": {"qk_ln": True}}),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}),
    ("mpt", {"attn_config": {"prefix_lm": True}}),
    ("mpt", {"attn_config": {"alibi": False}}),
    ("mpt", {"expansion_ratio": 8}),
    ("mpt", {"logit_scale": 0.5}),
    ("mpt", {"no_bias": False}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}),
    ("qwen2_moe", {"mlp_only_layers": [0]}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen2_moe", {"use_sliding_window": True}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("gptj", {"rotary_dim": None}),
    ("gpt_neox", {"hidden_act": "mish"}),
    ("phi3", {"attention_bias": True}),
    ("olmo2", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}),
]


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_config_round_trip(name):
    config = FAMILY_CONFIGS[name]
    assert config_from_hf(*config_to_hf(config)) == config


@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_weights_round_trip_is_exact(tmp_path, name):
    model = Model(FAMILY_CONFIGS[name])
    params = random_params(model)
    save(tmp_path, model, params, max_shard_size=9_000)
    read, again = load(tmp_path)
    assert read == model
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(("family", "change"), REFUSED, ids=str)
def test_what_no_published_checkpoint_has_is_refused_by_name(family, change):
    raw, _ = config_to_hf(FAMILY_CONFIGS[family])
    key, value = next(iter(change.items()))
    if key == "attn_config":
        key = next(iter(value))
        change = {"attn_config": raw["attn_config"] | value}
    with pytest.raises(ValueError, match=key.replace("rope_scaling", "rope type")):
        config_from_hf(raw | change)


def test_a_scalar_head_that_transformers_lacks_is_refused_before_any_file(tmp_path):
    model = Model(FAMILY_CONFIGS["granite"]).with_scalar_head()
    with pytest.raises(ValueError, match="no class for a granite model"):
        save(tmp_path, model, random_params(model))
    assert not list(tmp_path.iterdir())
