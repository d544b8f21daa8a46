"""Families in their files: round trips, and what is refused by name."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jalign import plan
from jalign.models import Model, check_writable, load, save
from jalign.models.hf_config import config_from_hf, config_to_hf
from tests.models.tiny import CONFIGS, FAMILY_CONFIGS, random_params

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


# As older files, or those of a larger model, have the names: what is taken off, and put
# before each; and what else may be there.
OLDER = {
    "bloom": ("transformer.", "", ()),
    "gpt2": ("transformer.", "", ("h.0.attn.bias", "h.0.attn.masked_bias")),
    "opt": ("model.", "", ()),
    "gpt_neox": ("gpt_neox.", "", ("layers.0.attention.rotary_emb.inv_freq",)),
    "gemma3_text": ("", "language_model.", ("vision_tower.post_layernorm.weight",)),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_names_of_tensors_are_read(tmp_path, name):
    model, (less, more, others) = Model(FAMILY_CONFIGS[name]), OLDER[name]
    params, file = random_params(model), tmp_path / "model.safetensors"
    save(tmp_path, model, params)
    tensors = {more + n.removeprefix(less): x for n, x in load_file(file).items()}
    save_file(tensors | dict.fromkeys(others, np.zeros(2, "f4")), file)
    _, again = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    save_file(tensors | {"h.0.foreign.weight": np.zeros(2, "f4")}, file)
    with pytest.raises(ValueError, match="h.0.foreign.weight"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["bloom", "qwen2_moe"])
def test_the_plan_of_a_folder_counts_what_its_arrays_hold(tmp_path, name):
    model = Model(FAMILY_CONFIGS[name])
    params = random_params(model)
    save(tmp_path, model, params)
    result = plan.plan("sft", str(tmp_path), batch_size=8, mesh="data=8", max_length=16)
    held = {row.name: row.bytes for row in result.resident}
    leaves = jax.tree.leaves(params)
    assert held["parameters"] == sum(x.nbytes for x in leaves)
    assert result.num_parameters == sum(x.size for x in leaves)


@pytest.mark.parametrize(("family", "change"), REFUSED, ids=str)
def test_what_no_published_checkpoint_has_is_refused_by_name(family, change):
    raw, _ = config_to_hf(FAMILY_CONFIGS[family])
    key, value = next(iter(change.items()))
    if key == "attn_config":
        key = next(iter(value))
        change = {"attn_config": raw["attn_config"] | value}
    with pytest.raises(ValueError, match=key.replace("rope_scaling", "rope type")):
        config_from_hf(raw | change)


MALFORMED = [
    ("opt", {"activation_function": ["relu"]}),
    ("opt", {"do_layer_norm_before": "yes"}),
    ("mpt", {"attn_config": [1]}),
    ("falcon", {"num_ln_in_parallel_attn": 7}),
    ("gpt_neox", {"rotary_pct": 3.0}),
    ("gemma2", {"layer_types": [1, 2]}),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": 5}}),
    ("gemma3_text", {"rope_parameters": {"full_attention": []}}),
    ("gemma3_text", {"_sliding_window_pattern": "six", "layer_types": None}),
    ("smollm3", {"no_rope_layers": [{}, 1]}),
    ("smollm3", {"no_rope_layer_interval": 0}),
    ("qwen2_moe", {"shared_expert_intermediate_size": "a"}),
]


@pytest.mark.parametrize(("family", "change"), MALFORMED, ids=str)
def test_a_value_of_no_use_is_refused_by_name(family, change):
    raw, _ = config_to_hf(FAMILY_CONFIGS[family])
    key = next(iter(change))
    with pytest.raises(ValueError, match=key):
        config_from_hf(raw | change)


def test_the_text_of_a_larger_gemma_is_a_mapping():
    with pytest.raises(ValueError, match="text_config=5 is not a mapping"):
        config_from_hf({"model_type": "gemma3", "text_config": 5})


def test_a_scalar_head_that_transformers_lacks_is_refused_before_any_file(tmp_path):
    model = Model(FAMILY_CONFIGS["granite"]).with_scalar_head()
    with pytest.raises(ValueError, match="no class for a granite model"):
        save(tmp_path, model, random_params(model))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no class for a granite model"):
        check_writable(model.config)


def test_switches_that_no_file_of_a_family_holds_are_named():
    changes = {"llama": dict(attention_softcap=5.0), "bloom": dict(norm="rms")}
    for name, change in (changes | {"gpt2": dict(qkv_layout="groups")}).items():
        config = dataclasses.replace((CONFIGS | FAMILY_CONFIGS)[name], **change)
        with pytest.raises(ValueError, match=f"{name} files.*{next(iter(change))}"):
            check_writable(config)
