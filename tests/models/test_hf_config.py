"""Tests for jalign/models/hf_config.py."""

import pytest

from jalign.models.hf_config import config_from_hf, config_to_hf
from tests.models.tiny import CONFIGS

RAW = config_to_hf(CONFIGS["llama"])[0]
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALING |= {"original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_round_trip(name):
    raw, generation = config_to_hf(CONFIGS[name])
    read = config_from_hf(raw, generation)
    want = CONFIGS[name]
    assert read == want


def test_both_spellings_of_rope_read_alike():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | SCALING}
    new = {"rope_type": "llama3", "rope_theta": 5e5} | SCALING
    bare = {k: v for k, v in RAW.items() if not k.startswith("rope")}
    first = config_from_hf(bare | old)
    assert first == config_from_hf(bare | {"rope_parameters": new})
    assert first.rope_theta == 5e5 and first.rope_scaling.factor == 8.0


def test_end_tokens_of_both_files_are_joined():
    config = config_from_hf(RAW | {"eos_token_id": 7}, {"eos_token_id": [7, 9]})
    assert config.eos_token_ids == (7, 9) and config.eos_token_id == 7
    # A family's default is none of a file that names others.
    bare = {k: v for k, v in RAW.items() if k != "eos_token_id"}
    assert config_from_hf(bare).eos_token_ids == (2,)
    assert config_from_hf(bare, {"eos_token_id": 9}).eos_token_ids == (9,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"architectures": ["LlamaForTokenClassification"]}, "TokenClassification"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "num_labels=2"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(RAW | change)


def test_qwen_window_is_all_layers_or_none():
    raw = config_to_hf(CONFIGS["qwen2"])[0] | {"sliding_window": 4}
    assert config_from_hf(raw).sliding_window is None
    on = raw | {"use_sliding_window": True}
    assert config_from_hf(on | {"max_window_layers": 0}).sliding_window == 4
    assert config_from_hf(on | {"max_window_layers": 2}).sliding_window is None
    with pytest.raises(ValueError, match="some of the layers"):
        config_from_hf(on | {"max_window_layers": 1})
