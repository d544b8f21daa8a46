"""A family's row against transformers' configuration class, which needs no torch."""

import pytest

from jalign.models.families import FAMILIES, keys_of
from jalign.models.hf_config import config_from_hf

SIZES = dict(vocab_size=200_000, hidden_size=2048, intermediate_size=96)
SIZES |= dict(num_layers=4, num_heads=32)


@pytest.fixture(scope="module")
def auto():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SCORED,
    )

    return CONFIG_MAPPING, SCORED


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_leaves_out_is_what_the_class_takes(name, auto):
    """All that is derived from it too: heads, windows, rotary bases."""
    keys = keys_of(name)
    sizes = {keys[field]: size for field, size in SIZES.items() if field in keys}
    full = auto[0][name](**sizes).to_dict()
    assert config_from_hf({"model_type": name, **sizes}) == config_from_hf(full)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_with_a_scalar_head_is_transformers(name, auto):
    prefix = FAMILIES[name].score_prefix
    own = prefix or FAMILIES[name].prefix
    want = None if prefix is None else f"{own}ForSequenceClassification"
    assert auto[1].get(name) == want
