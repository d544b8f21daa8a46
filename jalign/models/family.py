"""What a family of models is, as data: switches, config keys, names of modules."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jalign.models.config import ModelConfig
from jalign.models.hf_traits import Trait

Modules = dict[str, str]


class Family(NamedTuple):
    """One row: how a model_type differs from llama.

    Attributes:
      prefix: of the class names in `architectures`, as Llama in LlamaForCausalLM.
      modules: path of a parameter's module (or of the parameter) -> its name in the
        file; "{}" stands for the layer, and a second one for the expert.
      switches: ModelConfig fields that the family fixes.
      keys: ModelConfig field -> key in config.json, where that is not KEYS'; "" where
        the file has none.
      defaults: config.json keys that may be absent, and their values then. Source:
        transformers' configuration classes.
      traits: keys that are worked out.
      fixed: keys that would change the computation: another value is refused.
      root: what older files leave out before all names but the head's.
      ignored: names (regex) of buffers that older exporters wrote; they hold nothing
        that is not in the config.
      renamed: (regex, replacement) of names in files of a larger model.
      transposed: its kernels have inputs first.
      score_prefix: of the class with a scalar head, where that is not `prefix`; None
        where transformers has no such class.
      variant: modules that are called otherwise in some of its models.
    """

    prefix: str
    modules: Modules
    switches: dict[str, Any] = {}
    keys: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    traits: tuple[Trait, ...] = ()
    fixed: dict[str, Any] = {}
    root: str = "model."
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    score_prefix: str | None = ""
    variant: Callable[[ModelConfig], Modules] = lambda config: {}


# ModelConfig field -> key in config.json.
KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "max_position": "max_position_embeddings",
    # These are checked against the vocabulary.
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
# Without these a config.json says nothing, but where a family has a default.
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")


def named(root: str, top: Modules, layer: str, inner: Modules) -> Modules:
    """Module names from those within the root and within a layer; a "/" before a name
    keeps the root away."""

    def full(name: str) -> str:
        return name[1:] if name.startswith("/") else root + name

    layers = {f"layers/{path}": full(layer + name) for path, name in inner.items()}
    return {path: full(name) for path, name in top.items()} | layers


HEADS = {"unembed": "/lm_head", "score": "/score"}
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
# What config.json leaves out, in every family.
COMMON = {
    "tie_word_embeddings": False,
    "head_dim": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
