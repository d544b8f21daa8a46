"""Model families as data: config keys, and tensor names of the Hugging Face format.

Read by one interpreter in both directions (hf_config, hf_weights); what a tensor is,
the optimizer and the count of FLOPs read here too. To add a family, add a row; to add a
tensor, add a row to TENSORS.
"""

import math
import re
from typing import Any, NamedTuple

from jalign.models.config import ModelConfig
from jalign.sharding.rules import axes_of


class Tensor(NamedTuple):
    """One tensor of a checkpoint, or one per layer, and where it goes.

    Attributes:
      name: in the file; "{}" stands for the layer.
      path: of the parameter. A layer's tensor is one row of the stacked array.
      layout: the file's axes, by their logical names; those in brackets are one axis
        there. The parameter's own axes stand in sharding.rules.
      when: the ModelConfig switch that the tensor depends on: a field, or one of
        "causal" (has an unembedding of its own) and "score"; "" is always.
    """

    name: str
    path: str
    layout: str
    when: str = ""

    @property
    def stacked(self) -> bool:
        """Whether there is one in each layer."""
        return "{}" in self.name

    @property
    def kind(self) -> str:
        """One of MATRICES, as "kernel"; or "scale", "bias"."""
        return kind_of(self.path)

    @property
    def pattern(self) -> str:
        """How axes are regrouped, einops notation: file -> parameter of a layer."""
        axes = axes_of(self.path) or ()
        return f"{self.layout} -> {' '.join(filter(None, axes[self.stacked :]))}"

    @property
    def module(self) -> str:
        """The module that it is of, such as "lm_head"; "{}" stands for the layer."""
        return self.name.rpartition(".")[0]

    @property
    def num_inputs(self) -> int:
        """Of a kernel: how many of its axes, the first ones, meet the activations."""
        return len(groups(self.layout)[-1])  # a file has outputs first, then inputs

    def names(self, num_layers: int) -> list[str]:
        """Its name in each layer, or its one name."""
        layers = range(num_layers if self.stacked else 1)
        return [self.name.format(i) for i in layers]


MATRICES = ("kernel", "embedding", "lora_a", "lora_b")  # what weight decay takes


def kind_of(path: str) -> str:
    """The kind of the parameter at a path, see `Tensor.kind`."""
    return path.rpartition("/")[2]


def is_matrix(path: str) -> bool:
    """Whether the parameter at a path is one of MATRICES."""
    return kind_of(path) in MATRICES


def is_narrow(path: str) -> bool:
    """Whether a parameter that is frozen may be in the products' dtype: matrices, but
    not a scalar head's, which computes in float32 as norms and biases do."""
    return is_matrix(path) and not path.startswith("score/")


def groups(layout: str) -> list[list[str]]:
    """Axes of a file's tensor: "(n h) d" gives [["n", "h"], ["d"]]."""
    return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", layout)]


def file_shape(pattern: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in the file, from the parameter's (of one layer).

    For example ("(n h) d -> d n h", (64, 8, 16)) gives (128, 64).
    """
    left, right = pattern.split(" -> ")
    sizes = dict(zip(right.split(), shape, strict=True))
    return tuple(math.prod(sizes[name] for name in group) for group in groups(left))


def is_linear(row: Tensor) -> bool:
    """Whether it is the kernel of a layer: what adapters and quantization take."""
    return row.stacked and row.kind == "kernel"


LAYER = "model.layers.{}."


def _layer(name: str, path: str, layout: str, when: str = "") -> Tensor:
    return Tensor(LAYER + name, "layers/" + path, layout, when)


def _attention(name: str, path: str, layout: str, when: str = "") -> Tensor:
    return _layer("self_attn." + name, "attention/" + path, layout, when)


TENSORS = (
    Tensor("model.embed_tokens.weight", "embed/embedding", "vocab embed"),
    _layer("input_layernorm.weight", "attention_norm/scale", "norm"),
    _attention("q_proj.weight", "q/kernel", "(heads head_dim) embed"),
    _attention("k_proj.weight", "k/kernel", "(kv_heads head_dim) embed"),
    _attention("v_proj.weight", "v/kernel", "(kv_heads head_dim) embed"),
    _attention("o_proj.weight", "o/kernel", "embed (heads head_dim)"),
    _attention("q_proj.bias", "q/bias", "(heads head_dim)", "qkv_bias"),
    _attention("k_proj.bias", "k/bias", "(kv_heads head_dim)", "qkv_bias"),
    _attention("v_proj.bias", "v/bias", "(kv_heads head_dim)", "qkv_bias"),
    _attention("q_norm.weight", "q_norm/scale", "head_dim", "qk_norm"),
    _attention("k_norm.weight", "k_norm/scale", "head_dim", "qk_norm"),
    _layer("post_attention_layernorm.weight", "mlp_norm/scale", "norm"),
    _layer("mlp.gate_proj.weight", "mlp/gate/kernel", "mlp embed"),
    _layer("mlp.up_proj.weight", "mlp/up/kernel", "mlp embed"),
    _layer("mlp.down_proj.weight", "mlp/down/kernel", "embed mlp"),
    Tensor("model.norm.weight", "norm/scale", "norm"),
    Tensor("lm_head.weight", "unembed/kernel", "vocab embed", "causal"),
    Tensor("score.weight", "score/kernel", "labels embed", "score"),
)
TENSOR_AT = {row.path: row for row in TENSORS}

# Buffers that older exporters wrote; they hold nothing that is not in the config.
IGNORED_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
# Some exporters write this copy of a tied embedding: allowed where it is equal.
TIED_COPY, TIED_ORIGINAL = "lm_head.weight", "model.embed_tokens.weight"

# What adapters may be asked for by one word: a regex for modules of a layer.
ADAPTER_GROUPS = {"all": r".*", "attention": r"self_attn\..*", "mlp": r"mlp\..*"}

# Keys without which a config.json says nothing.
REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Switches that would change the computation: another value than this is refused.
FIXED_KEYS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}


class Check(NamedTuple):
    """What a value of a config.json may be, where it is there and not null.

    Attributes:
      kind: its type; float takes whole numbers too, neither takes true or false.
      low, high: bounds of a number, both allowed. The high ones are far beyond any
        model that there is: they stop what would fill the memory or never end.
      field: of ModelConfig that takes the value as it is; "" where it is worked out.
    """

    kind: type
    low: float = 0
    high: float = 0
    field: str = ""


_COUNT = Check(int, 1, 2**31 - 1)
_POSITIVE = Check(float, 1e-30, 1e30)
CONFIG_CHECKS = {
    "vocab_size": Check(int, 1, 2**24, "vocab_size"),
    "hidden_size": Check(int, 1, 2**18, "hidden_size"),
    "intermediate_size": Check(int, 1, 2**20, "intermediate_size"),
    "num_hidden_layers": Check(int, 1, 2**12, "num_layers"),
    "num_attention_heads": Check(int, 1, 2**12, "num_heads"),
    "num_key_value_heads": Check(int, 1, 2**12, "num_kv_heads"),
    "head_dim": Check(int, 1, 2**14, "head_dim"),
    "rms_norm_eps": Check(float, 1e-30, 1, "norm_eps"),
    "tie_word_embeddings": Check(bool, field="tie_embeddings"),
    "max_position_embeddings": _COUNT._replace(field="max_position"),
    "architectures": Check(list),
    "num_labels": Check(int, 0, 2**31 - 1),
    "id2label": Check(dict),
    "sliding_window": _COUNT,
    "use_sliding_window": Check(bool),
    "max_window_layers": Check(int, 0, 2**31 - 1),
    "layer_types": Check(list),
    "rope_theta": _POSITIVE,
    "rope_scaling": Check(dict),
    "rope_parameters": Check(dict),
}
# ModelConfig field -> key in config.json, the same in every family.
CONFIG_KEYS = {check.field: key for key, check in CONFIG_CHECKS.items() if check.field}
# These are checked against the vocabulary.
CONFIG_KEYS |= {"bos_token_id": "bos_token_id", "pad_token_id": "pad_token_id"}

_ROPE_NUMBERS = ("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor")
_ROPE_NUMBERS += ("high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
ROPE_CHECKS = dict.fromkeys(_ROPE_NUMBERS, _POSITIVE) | {
    "rope_type": Check(str),
    "type": Check(str),
    "original_max_position_embeddings": _COUNT,
    "mscale": Check(float, 0, 1e30),
    "mscale_all_dim": Check(float, 0, 1e30),
    "truncate": Check(bool),
}


class Family(NamedTuple):
    """One row: how a model_type differs from llama.

    Attributes:
      prefix: of the class names in `architectures`, as Llama in LlamaForCausalLM.
      switches: ModelConfig fields that the family fixes.
      defaults: config.json keys that may be absent, and their values then; where
        num_key_value_heads is None it is the number of heads, where head_dim is None
        it is hidden_size / heads. Source: transformers' configuration classes.
      window: "never", "always" (sliding_window is in force when set) or "switch"
        (only with use_sliding_window, from layer max_window_layers on).
      unfixed: FIXED_KEYS that the family does not read.
    """

    prefix: str
    switches: dict[str, Any]
    defaults: dict[str, Any]
    window: str = "never"
    unfixed: tuple[str, ...] = ()


_COMMON = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "head_dim": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN = _COMMON | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "llama": Family(
        "Llama",
        {},
        _COMMON | _IDS | {"num_key_value_heads": None, "max_position_embeddings": 2048},
    ),
    "mistral": Family(
        "Mistral",
        {},
        _COMMON
        | _IDS
        | {"num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"sliding_window": 4096},
        window="always",
        unfixed=("attention_bias", "mlp_bias"),
    ),
    "qwen2": Family(
        "Qwen2",
        {"qkv_bias": True},
        _QWEN,
        window="switch",
        unfixed=("attention_bias", "mlp_bias"),
    ),
    "qwen3": Family(
        "Qwen3",
        {"qk_norm": True},
        _QWEN | {"head_dim": 128},
        window="switch",
        unfixed=("mlp_bias",),
    ),
}


def tensors_of(config: ModelConfig) -> tuple[Tensor, ...]:
    """The rows of TENSORS that a model of this config has."""
    has = {
        "": True,
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.qk_norm,
        "causal": not config.num_labels and not config.tie_embeddings,
        "score": config.num_labels > 0,
    }
    return tuple(row for row in TENSORS if has[row.when])


def architecture_of(config: ModelConfig) -> str:
    """The transformers class that reads this model."""
    kind = "ForSequenceClassification" if config.num_labels else "ForCausalLM"
    return FAMILIES[config.family].prefix + kind
