"""PEFT's adapter_config.json: read strictly, and written.

The format is that of peft 0.21 (its LoraConfig). A key that changes what is computed
and that jalign does not compute is refused, a key that it does not know too; null, [],
{}, false and a key that is not there mean the same.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jalign.models.hf_checks import Check, check_values
from jalign.models.hf_files import ADAPTER_CONFIG, read_json
from jalign.models.lora import LoraConfig
from jalign.paths import is_url, joined, located

_RANK, _ALPHA = Check(int, 1, 2**16), Check(float, 1e-30, 1e30)
_CHECKS = {
    "peft_type": Check(str),
    "task_type": Check(str),
    "base_model_name_or_path": Check(str),
    "revision": Check(str),
    "r": _RANK,
    "lora_alpha": _ALPHA,
    "use_rslora": Check(bool),
    "rank_pattern": Check(dict),
    "alpha_pattern": Check(dict),
}
# Names or one regex; indices.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_INDICES = ("layers_to_transform",)
# Key -> what it asks for that is not computed here.
_REFUSED = {
    "use_dora": "DoRA's magnitudes",
    "lora_bias": "a bias on B",
    "use_qalora": "QA-LoRA's pooled inputs",
    "use_bdlora": "block-diagonal adapters",
    "target_parameters": "adapters of single parameters (experts)",
    "layer_replication": "layers that are there several times",
    "trainable_token_indices": "rows of the embedding trained alone",
    "alora_invocation_tokens": "adapters that a token turns on",
    "arrow_config": "a router over adapters",
    "kasa_config": "KaSA's singular values",
    "monteclora_config": "sampled adapters",
    "megatron_config": "Megatron's layers",
}
# Of the start, the training or the backward pass: nothing to compute here.
_UNUSED = ("lora_dropout", "inference_mode", "peft_version", "auto_mapping")
_UNUSED += ("loftq_config", "eva_config", "corda_config", "lora_ga_config")
_UNUSED += ("velora_config", "qalora_group_size", "megatron_core", "runtime_config")
_UNUSED += ("fan_in_fan_out",)  # PEFT sets it by the layer's class; A and B are alike
_KNOWN = {*_CHECKS, *_NAMES, *_INDICES, *_REFUSED, *_UNUSED}
_KNOWN |= {"bias", "init_lora_weights", "ensure_weight_tying"}
# The others change the base's weights, which such a file does not hold.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_TASKS = ("CAUSAL_LM", "SEQ_CLS")
MERGE = "merge it into its base with PEFT (merge_and_unload), and use the result"


class AdapterConfig(NamedTuple):
    """What an adapter_config.json says.

    Attributes:
      file: it.
      raw: its keys that are set.
      lora: ranks and alphas; which modules and what is trained in full, the tensors
        say.
    """

    file: Path
    raw: dict[str, Any]
    lora: LoraConfig

    def base(self, given: str | Path | None = None) -> str:
        """The base's folder or hub id: the given one, or the one that it names, by a
        path from here or from its folder. Raises: ValueError where it names none."""
        key = "base_model_name_or_path"
        named = self.raw.get(key, "") if given is None else str(given)
        if not named:
            raise ValueError(f"{self.file} has no {key}: give the base with --base")
        if given is not None or is_url(named) or located(named).expanduser().is_dir():
            return named
        beside = joined(self.file.parent, named)
        return str(beside) if beside.is_dir() else named

    @property
    def is_scalar(self) -> bool:
        """Whether the adapted model is a reward model or critic."""
        return self.raw.get("task_type") == _TASKS[1] or self.saves("score")

    def saves(self, module: str) -> bool:
        """Whether the file has a full copy of a module, by its full name."""
        # PEFT compares ends, not whole words.
        return any(module.endswith(name) for name in self.raw["modules_to_save"])

    def targets(self, module: str) -> bool:
        """Whether PEFT adapts a linear layer, by its full name, where target_modules is
        set; as its check_target_module_exists."""
        wanted = self.raw.get("target_modules")
        if _named(self.raw.get("exclude_modules"), module):
            return False
        if isinstance(wanted, str):
            return wanted == "all-linear" or _named(wanted, module)
        return _named(wanted, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        chosen = self.raw.get("layers_to_transform")
        if chosen is None:
            return True
        for pattern in _listed(self.raw.get("layers_pattern")) or [r"[^.]*"]:
            found = re.match(_layer_regex(pattern), module)
            if found:
                return int(found["layer"]) in _listed(chosen)
        return False


def _layer_regex(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\."


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _named(names: str | list[str] | None, module: str) -> bool:
    """One regex for the whole name, or whole ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names or [])


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads the adapter_config.json of a folder.

    Raises: FileNotFoundError; ValueError naming the file, and the key that is missing,
      unknown or not supported.
    """
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_CONFIG}: not an adapter")
    values = read_json(file)
    raw = {key: x for key, x in values.items() if x or type(x) in (int, float)}
    try:
        _check(raw)
        raw.setdefault("modules_to_save", [])
        return AdapterConfig(file, raw, _lora_config(raw))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _check(raw: dict[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r} is not supported, only 'LORA'; {MERGE}")
    for key, what in _REFUSED.items():
        if raw.get(key):
            shown = repr(raw[key])[:80]
            raise ValueError(f"{key}={shown}: {what} are not supported; {MERGE}")
    unknown = sorted(key for key in raw if raw[key] and key not in _KNOWN)
    if unknown:
        raise ValueError(
            f"{unknown[0]}={repr(raw[unknown[0]])[:80]} is a key that jalign does not "
            "know, so it cannot tell what it changes; remove it where it is of "
            f"training only, else {MERGE}"
        )
    check_values(raw, _CHECKS)
    bias = raw.get("bias", "none")
    if bias != "none":
        raise ValueError(f"bias={bias!r}: trained biases are not supported; {MERGE}")
    _check_start(raw.get("init_lora_weights"))
    if raw.get("task_type", _TASKS[0]) not in _TASKS:
        raise ValueError(f"task_type={raw['task_type']!r} is not one of {_TASKS}")
    _check_names(raw)


def _check_start(start: Any) -> None:
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights={start!r} has changed the base's weights: convert the "
            "adapter (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion), or " + MERGE
        )


def _check_names(raw: dict[str, Any]) -> None:
    kinds = dict.fromkeys(_NAMES, str) | dict.fromkeys(_INDICES, int)
    for key, kind in kinds.items():
        items = _listed(raw.get(key))
        if any(type(item) is not kind for item in items):
            shown = repr(raw[key])[:80]
            raise ValueError(f"{key}={shown} is not a list of {kind.__name__}")
    raw["modules_to_save"] = _listed(raw.get("modules_to_save"))
    if isinstance(raw.get("target_modules"), str) and _INDICES[0] in raw:
        raise ValueError(f"{_INDICES[0]} is of a list of target_modules, not a regex")
    regexes = [raw.get("target_modules"), raw.get("exclude_modules")]
    regexes += map(_layer_regex, _listed(raw.get("layers_pattern")))
    for regex in regexes:
        try:
            re.compile(regex if isinstance(regex, str) else "")
        except re.error as error:
            raise ValueError(f"{regex!r} is not a regex: {error}") from None


def _lora_config(raw: dict[str, Any]) -> LoraConfig:
    patterns = {}
    for key, kind in {"rank_pattern": _RANK, "alpha_pattern": _ALPHA}.items():
        given = raw.get(key, {})
        check_values(given, dict.fromkeys(given, kind), f"{key}: ")
        patterns[key] = tuple(given.items())
    return LoraConfig(
        rank=raw.get("r", 8),  # PEFT's defaults
        alpha=raw.get("lora_alpha", 8),
        rank_stabilized=raw.get("use_rslora", False),
        **patterns,
    )


def adapter_config(
    config: LoraConfig,
    adapted: Sequence[str],
    linear: Sequence[str],
    *,
    saved: Sequence[str],
    tied: bool,
    is_scalar: bool,
    transposed: bool,
) -> dict[str, Any]:
    """What stands in an adapter_config.json, but for the base and the training.

    Args:
      config: of the adapters.
      adapted: full names of the modules that have one.
      linear: those of all linear layers.
      saved: names of the modules that are trained in full.
      tied: whether an embedding among them is the head too.
      is_scalar, transposed: of the model, and of its kernels in files.
    """
    config = _sorted_patterns(config, adapted)
    left_out = {_end(module) for module in {*linear} - {*adapted}}
    # Ends of names where they say it all; else full names, as PEFT does it too.
    partly = left_out & {*map(_end, adapted)}
    targets = adapted if partly else map(_end, adapted)
    return {
        "alpha_pattern": {k: _number(x) for k, x in config.alpha_pattern},
        "bias": "none",
        "ensure_weight_tying": tied,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _number(config.alpha),
        "modules_to_save": [*saved] or None,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": dict(config.rank_pattern),
        "revision": None,
        "target_modules": sorted({*targets}),
        "task_type": _TASKS[is_scalar],
        "use_dora": False,
        "use_rslora": config.rank_stabilized,
    }


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def _number(x: float) -> float:
    """As PEFT writes it: a whole number without a point."""
    return int(x) if float(x).is_integer() else x


def _sorted_patterns(config: LoraConfig, modules: Sequence[str]) -> LoraConfig:
    """The same ranks and alphas by patterns whose order does not matter.

    PEFT sorts them whenever it saves, and the first one that matches counts. Those that
    match nothing, of which it warns, are left out.
    """

    def used(pairs) -> tuple[tuple[str, Any], ...]:
        first = {key: x for key, x in reversed(pairs) if x}
        regexes = {key: re.compile(rf"(.*\.)?({key})$") for key in sorted(first)}
        return tuple(
            (key, first[key])
            for key, r in regexes.items()
            if any(map(r.match, modules))
        )

    ordered = replace(
        config,
        rank_pattern=used(config.rank_pattern),
        alpha_pattern=used(config.alpha_pattern),
    )
    found = {module: config.rank_and_alpha(module) for module in modules}
    if all(ordered.rank_and_alpha(module) == both for module, both in found.items()):
        return ordered
    ranks = ((m, rank) for m, (rank, _) in found.items() if rank != config.rank)
    alphas = ((m, alpha) for m, (_, alpha) in found.items() if alpha != config.alpha)
    return replace(config, rank_pattern=(*ranks,), alpha_pattern=(*alphas,))
