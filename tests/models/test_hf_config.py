"""Tests for jalign/models/hf_config.py."""

import dataclasses
import json
import time

import pytest

from jalign import cli, models
from jalign.models.config import LayerKind
from jalign.models.hf_config import config_from_hf, config_to_hf, read_config
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


@pytest.mark.parametrize("kind", ["default", "linear"])
def test_the_base_is_that_of_the_scaling_then_the_files_then_10_000(kind):
    bare = {k: v for k, v in RAW.items() if not k.startswith("rope")}
    for name in ("rope_parameters", "rope_scaling"):
        raw = bare | {name: {"rope_type": kind, "factor": 2.0}}
        assert config_from_hf(raw).rope_theta == 10_000
        assert config_from_hf(raw | {"rope_theta": 5e5}).rope_theta == 5e5
        raw[name]["rope_theta"] = 7e4
        assert config_from_hf(raw | {"rope_theta": 5e5}).rope_theta == 7e4
    assert config_from_hf(bare).rope_theta == 10_000


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
        ({"model_type": "mamba"}, "mamba"),
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


BAD_VALUES = [
    ("vocab_size", True),
    ("vocab_size", 48.0),
    ("vocab_size", "48"),
    ("vocab_size", 0),
    ("hidden_size", -24),
    ("hidden_size", [24]),
    ("num_hidden_layers", 10**12),
    ("num_hidden_layers", 10**400),
    ("num_attention_heads", 0),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 3),
    ("num_key_value_heads", {}),
    ("head_dim", 7),
    ("head_dim", 10.5),
    ("max_position_embeddings", False),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", "1e-6"),
    ("tie_word_embeddings", 1),
    ("tie_word_embeddings", "false"),
    ("bos_token_id", "<s>"),
    ("pad_token_id", 0.5),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [7]),
    ("model_type", ["llama"]),
    ("num_labels", -1),
    ("rope_theta", 0),
    ("rope_theta", -10000.0),
    ("rope_theta", True),
    ("rope_scaling", "linear"),
    ("rope_scaling", [2.0]),
    ("rope_parameters", 4),
    ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
    ("rope_scaling", {"rope_type": "linear", "factor": -2}),
    ("rope_scaling", {"rope_type": ["linear"], "factor": 2.0}),
    ("rope_scaling", {"rope_type": "llama3"} | SCALING | {"low_freq_factor": 4.0}),
    (
        "rope_scaling",
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1.5},
    ),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=str)
def test_a_value_of_another_type_or_out_of_bounds_names_file_and_key(
    tmp_path, key, value
):
    text = json.dumps(RAW | {key: "VALUE"})
    shown = str(value) if isinstance(value, int | float) else json.dumps(value)
    if isinstance(value, bool):
        shown = shown.lower()
    file = tmp_path / "config.json"
    file.write_text(text.replace('"VALUE"', shown))
    start = time.perf_counter()
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert time.perf_counter() - start < 1
    name, _, message = str(error.value).partition(": ")
    named = {"architectures": "architecture", "rope_scaling": "rope "}.get(key, key)
    assert name == str(file) and len(message) < 300
    assert key in message or named in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "recursion"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ('{"rms_norm_eps": NaN}', "rms_norm_eps is nan"),
        ('{"a": {"b": [1, Infinity]}}', "b is inf"),
        ('{"a": 1e999}', "a is inf"),
        ("[]", "not a JSON object"),
        ("{", "not usable as JSON"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
    ],
    ids=range(8),
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object_is_named(tmp_path, name, text, message):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / name}: .*{message}"):
        read_config(tmp_path)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"vocab_size": True}))
    for command in (["generate", "--prompts", "x"], ["plan", "sft"]):
        assert cli.main([*command, "--model", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert "config.json: vocab_size=True is not a int" in error
        assert "Traceback" not in error


def test_qwen_windows_begin_at_a_layer():
    raw = config_to_hf(CONFIGS["qwen2"])[0] | {"sliding_window": 4}
    assert config_from_hf(raw).sliding_window is None
    on = raw | {"use_sliding_window": True}
    assert config_from_hf(on | {"max_window_layers": 0}).sliding_window == 4
    assert config_from_hf(on | {"max_window_layers": 2}).sliding_window is None
    some = config_from_hf(on | {"max_window_layers": 1})
    assert some.layer_kinds == (LayerKind(None), LayerKind(4))
    assert config_from_hf(config_to_hf(some)[0]).layer_kinds == some.layer_kinds


def test_what_no_file_or_class_holds_is_refused():
    granite = config_from_hf(RAW | {"model_type": "granite"})
    models.check_writable(granite)
    with pytest.raises(ValueError, match="no class for a granite model"):
        models.check_writable(dataclasses.replace(granite, num_labels=1))
    for field, value in {"final_softcap": 30.0, "sliding_window": 4}.items():
        with pytest.raises(ValueError, match=f"llama files cannot hold {field}"):
            changed = dataclasses.replace(CONFIGS["llama"], **{field: value})
            models.check_writable(changed)
