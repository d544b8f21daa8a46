"""The tables: every parameter path has one rule, every logical axis a mesh axis."""

import re

import pytest
from jax.sharding import PartitionSpec as P

from jalign import sharding
from jalign.sharding.mesh import MESH_AXES
from jalign.sharding.rules import AXIS_RULES, PARAM_RULES

from . import layout

# What each array must look like on a mesh where every axis is larger than 1.
EXPECTED = {
    "embed/embedding": P("tensor", "fsdp"),
    "layers/attention_norm/scale": P(None, None),
    "layers/attention/q/kernel": P(None, "fsdp", "tensor", None),
    "layers/attention/k/kernel": P(None, "fsdp", "tensor", None),
    "layers/attention/v/kernel": P(None, "fsdp", "tensor", None),
    "layers/attention/o/kernel": P(None, "tensor", None, "fsdp"),
    "layers/attention/q/bias": P(None, "tensor", None),
    "layers/attention/k/bias": P(None, "tensor", None),
    "layers/attention/v/bias": P(None, "tensor", None),
    "layers/attention/q_norm/scale": P(None, None),
    "layers/attention/k_norm/scale": P(None, None),
    "layers/mlp_norm/scale": P(None, None),
    "layers/mlp/gate/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/up/kernel": P(None, "fsdp", "tensor"),
    "layers/mlp/down/kernel": P(None, "tensor", "fsdp"),
    "norm/scale": P(None),
    "unembed/kernel": P("fsdp", "tensor"),
    "score/kernel": P("fsdp", None),
}


def test_every_path_of_the_layout_has_the_expected_spec():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    specs = {
        path: value.spec
        for path, value in layout.flat(
            sharding.param_shardings(mesh, layout.shapes())
        ).items()
    }
    assert specs == EXPECTED


@pytest.mark.parametrize("path", EXPECTED)
def test_exactly_one_rule_matches(path):
    assert sum(bool(re.fullmatch(regex, path)) for regex, _ in PARAM_RULES) == 1


def test_logical_axes_name_mesh_axes():
    assert {axis for axes in AXIS_RULES.values() for axis in axes} == set(MESH_AXES)
    used = {name for _, axes in PARAM_RULES for name in axes if name is not None}
    assert used <= set(AXIS_RULES)
