"""Tests for jalign/models/families.py: each published size adds up."""

import math

import jax
import pytest

from jalign.models import Model
from jalign.models.families import tensors_of
from jalign.models.hf_config import config_from_hf
from tests.models.tiny import CONFIGS

# name -> (config.json as published, parameters of the model card's arithmetic)
PUBLISHED = {
    "llama-2-7b": (
        dict(model_type="llama", vocab_size=32000, hidden_size=4096)
        | dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        6_738_415_616,
    ),
    "llama-3.1-8b": (
        dict(model_type="llama", vocab_size=128256, hidden_size=4096)
        | dict(intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8),
        8_030_261_248,
    ),
    "llama-3.2-1b": (
        dict(model_type="llama", vocab_size=128256, hidden_size=2048)
        | dict(intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
        | dict(num_key_value_heads=8, tie_word_embeddings=True),
        1_235_814_400,
    ),
    "mistral-7b": (
        dict(model_type="mistral", vocab_size=32000, hidden_size=4096)
        | dict(intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
        | dict(num_key_value_heads=8),
        7_241_732_096,
    ),
    "qwen2-0.5b": (
        dict(model_type="qwen2", vocab_size=151936, hidden_size=896)
        | dict(intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14)
        | dict(num_key_value_heads=2, tie_word_embeddings=True),
        494_032_768,
    ),
    "qwen3-0.6b": (
        dict(model_type="qwen3", vocab_size=151936, hidden_size=1024)
        | dict(intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)
        | dict(num_key_value_heads=8, tie_word_embeddings=True),
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes_have_the_published_number_of_parameters(name):
    raw, count = PUBLISHED[name]
    shapes = Model(config_from_hf(raw)).param_shapes()
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_parameter_has_exactly_one_row(name):
    config = CONFIGS[name]
    flat, _ = jax.tree_util.tree_flatten_with_path(Model(config).param_shapes())
    paths = ["/".join(str(k.key) for k in path) for path, _ in flat]
    assert sorted(paths) == sorted(row.path for row in tensors_of(config))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_rows_are_unique(name):
    rows = tensors_of(CONFIGS[name])
    assert len({row.name for row in rows}) == len(rows)
