"""Tests for jalign/models/config.py."""

import dataclasses

import pytest

from jalign.models import ModelConfig, RopeScaling
from tests.models.tiny import CONFIGS, SIZES


def test_config_is_hashable_and_compares_by_value():
    config = CONFIGS["llama3"]
    assert hash(config) == hash(dataclasses.replace(config))
    assert config != CONFIGS["llama"]


@pytest.mark.parametrize(
    "change",
    [
        dict(num_kv_heads=3),
        dict(head_dim=5),
        dict(num_layers=0),
        dict(num_labels=2),
        dict(sliding_window=0),
        dict(vocab_size="48"),
    ],
    ids=str,
)
def test_bad_fields_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIGS["llama"], **change)


def test_bad_rope_scaling_is_refused():
    with pytest.raises(ValueError, match="dynamic"):
        RopeScaling("dynamic", factor=2.0)
    with pytest.raises(ValueError, match="original_max_position"):
        RopeScaling("yarn", factor=2.0)
    with pytest.raises(ValueError, match="factor"):
        RopeScaling("linear", factor=0.0)


def test_longrope_has_a_factor_for_each_frequency():
    factors = dict(short_factors=(1.0, 2.0), long_factors=(1.0, 2.0, 3.0))
    scaling = RopeScaling("longrope", 4.0, 8, **factors)
    with pytest.raises(ValueError, match="longrope has 2 factors, and 3 frequencies"):
        ModelConfig(**SIZES | dict(head_dim=6), rope_scaling=scaling)
