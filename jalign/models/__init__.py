"""LLaMA-style decoders in Flax, from Hugging Face checkpoints and back.

The only room that imports flax. Parameters are plain nested dicts with layers stacked
on axis 0; a `Model` holds the sizes and turns (params, tokens) into hidden states.
"""

from jalign.models import lora, quantize, quantized
from jalign.models.attention import attend
from jalign.models.cache import KVCache
from jalign.models.config import Experts, LayerKind, ModelConfig, RopeScaling
from jalign.models.heads import add_scalar_head, add_value_head, split_heads
from jalign.models.hf_config import check_writable, read_config
from jalign.models.hf_files import model_folder
from jalign.models.hf_weights import load, save
from jalign.models.model import Model
from jalign.models.peft_files import load_adapter, save_adapter

__all__ = [
    "Experts",
    "KVCache",
    "LayerKind",
    "Model",
    "ModelConfig",
    "RopeScaling",
    "add_scalar_head",
    "add_value_head",
    "attend",
    "check_writable",
    "load",
    "load_adapter",
    "lora",
    "model_folder",
    "quantize",
    "quantized",
    "read_config",
    "save",
    "save_adapter",
    "split_heads",
]
