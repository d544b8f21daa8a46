"""Tests for jalign/models/families.py: parameters and rows."""

import math

import jax
import pytest

from jalign.models import Model
from jalign.models.families import tensors_of
from jalign.models.hf_config import config_from_hf
from tests.models.tiny import CONFIGS, FAMILY_CONFIGS, shapes_of


def test_a_text_model_beside_images_takes_its_classs_sizes():
    """The file of Gemma 3's 4B says no more of its text than this (plan/published.py
    has the sizes that are told in full; tests/plan counts them)."""
    text = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    config = config_from_hf(dict(model_type="gemma3", text_config=text))
    shapes = Model(config).param_shapes()
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == 3_880_263_168


ALL = CONFIGS | FAMILY_CONFIGS


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_parameter_has_exactly_one_row(name):
    config = ALL[name]
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes_of(Model(config)))
    paths = ["/".join(str(k.key) for k in path) for path, _ in flat]
    assert sorted(paths) == sorted(row.path for row in tensors_of(config))


@pytest.mark.parametrize("name", sorted(ALL))
def test_rows_are_unique(name):
    rows = tensors_of(ALL[name])
    assert len({row.name for row in rows}) == len(rows)
