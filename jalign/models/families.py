"""All families, and the interpreter of their rows: a config's tensors and classes.

Read in both directions (hf_config, hf_weights). To add a family, add a row; what a
tensor is stands in tensors.py, what a switch does in config.py.
"""

from jalign.models.config import ModelConfig
from jalign.models.families_gpt import GPT_FAMILIES
from jalign.models.families_llama import LLAMA_FAMILIES
from jalign.models.family import KEYS, Family
from jalign.models.tensors import Tensor, is_linear, kind_of, layout_of, paths_of

FAMILIES: dict[str, Family] = LLAMA_FAMILIES | GPT_FAMILIES


def keys_of(family: str) -> dict[str, str]:
    """ModelConfig field -> key in config.json."""
    merged = KEYS | FAMILIES[family].keys
    return {field: key for field, key in merged.items() if key}


def tensors_of(config: ModelConfig) -> tuple[Tensor, ...]:
    """The tensors of a model of this config, in the order of a checkpoint."""
    family = FAMILIES[config.family]
    return tuple(
        Tensor(
            _name(config, family, path),
            path,
            layout_of(path, family.transposed and is_linear(path)),
        )
        for path in paths_of(config)
    )


def _name(config: ModelConfig, family: Family, path: str) -> str:
    modules = family.modules | family.variant(config)
    module = path if path in modules else path.rpartition("/")[0]
    return modules[module] + (".bias" if kind_of(path) == "bias" else ".weight")


def tied_names(config: ModelConfig) -> tuple[str, str]:
    """(the copy of a tied embedding that some exporters write, the embedding)."""
    modules = FAMILIES[config.family].modules
    return modules["unembed"] + ".weight", modules["embed"] + ".weight"


def architecture_of(config: ModelConfig) -> str:
    """The transformers class that reads this model."""
    family = FAMILIES[config.family]
    if not config.num_labels:
        return family.prefix + "ForCausalLM"
    if family.score_prefix is None:
        raise ValueError(
            f"transformers has no class for a {config.family} model with a scalar head"
        )
    return (family.score_prefix or family.prefix) + "ForSequenceClassification"
