"""config.json <-> ModelConfig, both of transformers 4's and 5's spelling."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from jalign.models.config import ROPE_KINDS, ModelConfig, RopeScaling
from jalign.models.families import (
    CONFIG_CHECKS,
    CONFIG_KEYS,
    FAMILIES,
    FIXED_KEYS,
    REQUIRED_KEYS,
    ROPE_CHECKS,
    Check,
    Family,
    architecture_of,
)
from jalign.models.hf_files import is_adapter, read_json
from jalign.models.hf_headers import check_quantization

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of generation_config.json that ModelConfig has, or that are not ours to say.
_NOT_KEPT = {*_TOKEN_KEYS, "transformers_version", "_from_model_config"}
# RopeScaling field -> key in config.json, where that is another.
_ROPE_KEYS = {"original_max_position": "original_max_position_embeddings"}
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", *_ROPE_KEYS, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", *_ROPE_KEYS, *_YARN, "truncate"),
}


def read_config(path: Path) -> ModelConfig:
    """ModelConfig of a checkpoint folder, or of a config.json. Errors name the file
    and the key."""
    file = path / "config.json" if path.is_dir() else path
    if is_adapter(path):
        raise ValueError(
            f"{path} holds an adapter only: load_pretrained takes it with its base, "
            "and jalign merge makes one model of both"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: not a model")
    generation = file.with_name("generation_config.json")
    raw, more = read_json(file), read_json(generation) if generation.is_file() else {}
    try:
        config = config_from_hf(raw, more)
        check_token_ids(raw, config.vocab_size)
        file = generation
        check_token_ids(more, config.vocab_size)
        return config
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def config_from_hf(
    raw: dict[str, Any], generation: dict[str, Any] | None = None
) -> ModelConfig:
    """Reads the dict of a config.json.

    Args:
      raw: of config.json.
      generation: of generation_config.json, whose end-of-text tokens are added.

    Raises: ValueError naming the key that is missing, unknown or not supported.
    """
    family_name = raw.get("model_type")
    if not isinstance(family_name, str) or family_name not in FAMILIES:
        raise ValueError(
            f"model_type {family_name!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[family_name]
    missing = [key for key in REQUIRED_KEYS if raw.get(key) is None]
    if missing:
        raise ValueError(f"missing key(s) {', '.join(missing)}")
    check_values(raw, CONFIG_CHECKS)
    _check_fixed(raw, family)
    check_quantization(raw)
    values = family.defaults | raw
    fields = {field: values.get(key) for field, key in CONFIG_KEYS.items()}
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_dim"] is None:
        width, heads = raw["hidden_size"], raw["num_attention_heads"]
        if width % heads:
            raise ValueError(
                f"hidden_size={width} is not a multiple of num_attention_heads={heads}"
            )
        fields["head_dim"] = width // heads
    theta, scaling = _read_rope(values)
    generation = generation or {}
    others = {k: v for k, v in generation.items() if k not in _NOT_KEPT}
    fields |= {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "family": family_name,
        "sliding_window": _read_window(values, family),
        "num_labels": _read_num_labels(raw),
        "eos_token_ids": _eos_ids(raw, generation, family.defaults),
        "generation": json.dumps(others),
    }
    try:
        return ModelConfig(**fields, **family.switches)
    except ValueError as error:  # in the file's words
        message = str(error)
        for field, key in CONFIG_KEYS.items():
            message = re.sub(rf"\b{field}\b", key, message)
        raise ValueError(message) from error


def check_values(raw: dict[str, Any], checks: dict[str, Check], of: str = "") -> None:
    """Raises ValueError naming the first key whose value is of no use.

    Args:
      raw: of a JSON file.
      checks: key -> what its value may be.
      of: what goes before the key in a message.
    """
    for key, check in checks.items():
        value = raw.get(key)
        if value is None:
            continue
        shown = f"{of}{key}={repr(value)[:80]}"  # a stranger's value may be long
        kinds = (int, float) if check.kind is float else (check.kind,)
        if type(value) not in kinds:
            name = {dict: "mapping", float: "number"}.get(check.kind)
            raise ValueError(f"{shown} is not a {name or check.kind.__name__}")
        if check.kind in (int, float) and not check.low <= value <= check.high:
            bounds = f"{check.low:g} to {check.high:g}"
            raise ValueError(f"{shown} is out of bounds: {bounds}")


def _check_fixed(raw: dict[str, Any], family: Family) -> None:
    for key, value in FIXED_KEYS.items():
        if key not in family.unfixed and raw.get(key, value) not in (value, None):
            raise ValueError(f"{key}={raw[key]!r} is not supported, only {value!r}")


def _read_num_labels(raw: dict[str, Any]) -> int:
    architecture = str((raw.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        # transformers stores the labels, not their number; without them it means 2.
        return raw.get("num_labels") or len(raw.get("id2label") or "12")
    if architecture and not architecture.endswith("ForCausalLM"):
        raise ValueError(f"architecture {architecture!r} is not supported")
    return 0


def check_token_ids(values: dict[str, Any], vocab_size: int) -> None:
    """Raises ValueError for a special token's id that the model does not embed.

    Args:
      values: of config.json or generation_config.json.
      vocab_size: V.
    """
    for key in _TOKEN_KEYS:
        ids = values.get(key)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{key}={ids!r} is not in the vocabulary, 0 to {vocab_size - 1}; "
                    "name a token of it, or set it to null"
                )


def _eos_ids(*sources: dict[str, Any]) -> tuple[int, ...]:
    """What config.json and generation_config.json name; else the family's default."""
    *files, defaults = sources
    found = [x["eos_token_id"] for x in files if "eos_token_id" in x]
    found = found or [defaults.get("eos_token_id")]
    lists = [eos if isinstance(eos, list | tuple) else [eos] for eos in found]
    return tuple(dict.fromkeys(i for ids in lists for i in ids if i is not None))


def _read_window(values: dict[str, Any], family: Family) -> int | None:
    window, layers = values.get("sliding_window"), values["num_hidden_layers"]
    if family.window == "never" or window is None:
        return None
    if family.window == "always":
        return window
    if not values.get("use_sliding_window", False):
        return None
    full = min(values["max_window_layers"], layers)
    kinds = values.get("layer_types") or (
        ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    )
    if len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers of {layers}")
    if len(set(map(str, kinds))) > 1:
        raise ValueError("a sliding window on only some of the layers is not supported")
    return window if kinds[0] == "sliding_attention" else None


def _read_rope(values: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: rope_parameters (5) or rope_theta and rope_scaling (4)."""
    name = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(name) or {}
    check_values(rope, ROPE_CHECKS, f"{name}.")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    theta = 10_000.0 if theta is None else float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; known: {ROPE_KINDS}")
    if "factor" not in rope:
        raise ValueError(f"rope type {kind!r} without a factor")
    fields = {f: rope.get(_ROPE_KEYS.get(f, f)) for f in _ROPE_FIELDS[kind]}
    if fields.get("original_max_position", 1) is None:
        fields["original_max_position"] = values["max_position_embeddings"]
    given = {field: value for field, value in fields.items() if value is not None}
    return theta, RopeScaling(kind, **given)


def settled(config: ModelConfig, tokenizer: Any) -> ModelConfig:
    """The config, agreeing with the tokenizer beside it, if any, on EOS and padding."""
    if tokenizer is None:
        return config
    pad, eos = tokenizer.pad_token_id, (*config.eos_token_ids, tokenizer.eos_token_id)
    ids = tuple(dict.fromkeys(token for token in eos if token is not None))
    pad = config.pad_token_id if pad is None else pad
    return dataclasses.replace(config, eos_token_ids=ids, pad_token_id=pad)


def config_to_hf(
    config: ModelConfig, dtype: str = "float32"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dicts of config.json and generation_config.json.

    In transformers 4's spelling, which 5 reads too.

    Raises: ValueError where the family's files cannot hold what the config says.
    """
    if config.final_softcap is not None:
        raise ValueError(f"{config.family} files cannot hold a final_softcap")
    raw: dict[str, Any] = {
        "architectures": [architecture_of(config)],
        "model_type": config.family,
    }
    raw |= {key: getattr(config, field) for field, key in CONFIG_KEYS.items()}
    eos = list(config.eos_token_ids)
    raw["eos_token_id"] = eos if len(eos) > 1 else config.eos_token_id
    raw |= {"hidden_act": "silu", "torch_dtype": dtype, "initializer_range": 0.02}
    raw |= {
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_rope(config.rope_scaling),
    }
    raw |= _write_window(config)
    if config.num_labels:
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if "attention_bias" not in FAMILIES[config.family].unfixed:
        raw["attention_bias"] = False
    ids = {key: raw[key] for key in _TOKEN_KEYS if raw[key] is not None}
    return raw, json.loads(config.generation) | ids


def _write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = {f: getattr(scaling, f) for f in _ROPE_FIELDS[scaling.kind]}
    given = {_ROPE_KEYS.get(f, f): x for f, x in fields.items() if x is not None}
    return {"rope_type": scaling.kind} | given


def _write_window(config: ModelConfig) -> dict[str, Any]:
    kind = FAMILIES[config.family].window
    if kind == "never":
        if config.sliding_window is not None:
            raise ValueError(f"{config.family} files cannot hold a sliding window")
        return {}
    if kind == "always":
        return {"sliding_window": config.sliding_window}
    on = config.sliding_window is not None
    return {
        "use_sliding_window": on,
        "sliding_window": config.sliding_window,
        "max_window_layers": 0 if on else config.num_layers,
    }
