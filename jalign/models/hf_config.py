"""config.json <-> ModelConfig, both of transformers 4's and 5's spelling."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from jalign.models.config import ModelConfig
from jalign.models.families import FAMILIES, architecture_of, keys_of
from jalign.models.family import REQUIRED, Family
from jalign.models.hf_checks import FIELD_CHECKS, KEY_CHECKS, check_values
from jalign.models.hf_files import is_adapter, read_json
from jalign.models.hf_headers import check_quantization
from jalign.models.hf_traits import joined

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of generation_config.json that ModelConfig has, or that are not ours to say.
_NOT_KEPT = {*_TOKEN_KEYS, "transformers_version", "_from_model_config"}
# Other names of one key, in files of other versions.
_ALIASES = {"n_embed": "hidden_size", "num_attention_heads": "n_head"}
_ALIASES |= {"num_hidden_layers": "n_layer"}


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
    if raw.get("model_type") == "gemma3":  # images and text: the text's part
        check_values(raw, KEY_CHECKS)
        raw = raw | {"model_type": "gemma3_text"} | (raw.get("text_config") or {})
    family_name = raw.get("model_type")
    if not isinstance(family_name, str) or family_name not in FAMILIES:
        raise ValueError(
            f"model_type {family_name!r} is not supported; known: {', '.join(FAMILIES)}"
        )
    family, keys = FAMILIES[family_name], keys_of(family_name)
    raw = _with_aliases(raw, keys)
    values = family.defaults | raw
    required = [keys[field] for field in REQUIRED if field in keys]
    required = [key for key in required if key not in family.defaults]
    missing = [key for key in required if raw.get(key) is None]
    if missing:
        raise ValueError(f"missing key(s) {', '.join(missing)}")
    own = {keys[f]: check for f, check in FIELD_CHECKS.items() if f in keys}
    check_values(raw, own | KEY_CHECKS)
    _check_fixed(raw, family)
    check_quantization(raw)
    fields = _sizes({field: values.get(key) for field, key in keys.items()}, keys)
    fields = joined(family.traits, values, family.switches | fields)
    generation = generation or {}
    others = {k: v for k, v in generation.items() if k not in _NOT_KEPT}
    fields |= {
        "family": family_name,
        "num_labels": _read_num_labels(raw),
        "eos_token_ids": _eos_ids(raw, generation, family.defaults),
        "generation": json.dumps(others),
    }
    try:
        return ModelConfig(**fields)
    except ValueError as error:  # in the file's words
        message = str(error)
        for field, key in keys.items():
            message = re.sub(rf"\b{field}\b", key, message)
        raise ValueError(message) from error


def _with_aliases(raw: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    known = set(keys.values())
    named = {
        new: raw[old]
        for old, new in _ALIASES.items()
        if old in raw and old not in known and new in known
    }
    return named | raw


def _sizes(fields: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The fields of a family's own keys, with those that follow from others."""
    heads, width = fields["num_heads"], fields["hidden_size"]
    if fields.get("num_kv_heads") is None:
        fields["num_kv_heads"] = heads
    if fields.get("head_dim") is None:
        if width % heads:
            raise ValueError(
                f"{keys['hidden_size']}={width} is not a multiple of "
                f"{keys['num_heads']}={heads}"
            )
        fields["head_dim"] = width // heads
    if fields.get("intermediate_size") is None:
        fields["intermediate_size"] = 4 * width
    optional = ("query_scale", "attention_softcap", "final_softcap", "rotary_dim")
    optional += ("bos_token_id", "pad_token_id")
    return {f: x for f, x in fields.items() if x is not None or f in optional}


def _check_fixed(raw: dict[str, Any], family: Family) -> None:
    for key, value in family.fixed.items():
        if raw.get(key, value) not in (value, None):
            raise ValueError(f"{key}={raw[key]!r} is not supported, only {value!r}")


def _read_num_labels(raw: dict[str, Any]) -> int:
    architecture = str((raw.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        # transformers stores the labels, not their number; without them it means 2.
        return raw.get("num_labels") or len(raw.get("id2label") or "12")
    known = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if architecture and not architecture.endswith(known):
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
    check_writable(config)
    family, keys = FAMILIES[config.family], keys_of(config.family)
    raw: dict[str, Any] = {
        "architectures": [architecture_of(config)],
        "model_type": config.family,
    }
    raw |= {key: getattr(config, field) for field, key in keys.items()}
    eos = list(config.eos_token_ids)
    raw["eos_token_id"] = eos if len(eos) > 1 else config.eos_token_id
    raw |= {"torch_dtype": dtype, "initializer_range": 0.02}
    for trait in family.traits:
        raw |= trait.write(config)
    if config.num_labels:
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    raw |= {key: value for key, value in family.fixed.items() if value is not None}
    ids = {key: raw[key] for key in _TOKEN_KEYS if raw[key] is not None}
    return raw, json.loads(config.generation) | ids


def check_writable(config: ModelConfig) -> None:
    """Raises ValueError where no file of the family, or class, holds such a model.

    That is, where reading what is written would give another one.
    """
    architecture_of(config)
    family, raw = FAMILIES[config.family], {}
    for trait in family.traits:
        raw |= trait.write(config)
    keys = keys_of(config.family)
    raw |= {key: getattr(config, field) for field, key in keys.items()}
    known = {field: getattr(config, field) for field in (*keys, "head_dim")}
    read = joined(family.traits, family.defaults | raw, family.switches | known)
    for field in (f.name for f in dataclasses.fields(ModelConfig)):
        default = getattr(_DEFAULTS, field, None)
        if field not in _ALWAYS and read.get(field, default) != getattr(config, field):
            what = f"{field}={getattr(config, field)!r}"
            raise ValueError(f"{config.family} files cannot hold {what}")


_DEFAULTS = ModelConfig(1, 2, 1, 1, 1, 1, 2)
_ALWAYS = {"family", "num_labels", "eos_token_ids", "generation", "head_dim"}
_ALWAYS |= {"num_kv_heads", "intermediate_size", "max_position"}
