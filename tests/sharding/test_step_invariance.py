"""SFT and DPO steps give the same loss and parameters on every mesh."""

import functools

import numpy as np
import pytest

from jalign import sharding
from tests.models.tiny import FAMILY_CONFIGS

from . import processes, steps

pytestmark = pytest.mark.slow  # eight devices on few cores: mostly compilation


@functools.cache
def _alone(recipe):
    return steps.train(recipe, None)


def _same(got, recipe):
    for name, expected in _alone(recipe).items():
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_training_moves_the_parameters(recipe):
    losses = _alone(recipe)["loss"]
    assert np.isfinite(losses).all() and len(set(losses)) == steps.STEPS


_CUBE = dict(data=2, fsdp=2, tensor=2)
_CASES = [("sft", dict(fsdp=8), 1), ("sft", _CUBE, 2), ("dpo", dict(fsdp=8), 1)]


@pytest.mark.parametrize(
    ("recipe", "sizes", "microbatches"), [*_CASES, ("dpo", _CUBE, 1)], ids=str
)
def test_one_device_and_a_mesh_agree(recipe, sizes, microbatches):
    _same(steps.train(recipe, sharding.make_mesh(**sizes), microbatches), recipe)


@pytest.mark.parametrize(("recipe", "microbatches"), [("sft", 2), ("dpo", 1)])
def test_shares_of_rows_step_as_whole_ones(recipe, microbatches):
    mesh = sharding.make_mesh(fsdp=2, context=4)
    _same(steps.train(recipe, mesh, microbatches, attention="blocked"), recipe)


@pytest.mark.parametrize("name", ["bloom", "qwen2_moe"])
def test_families_step_alike_on_a_mesh(name):
    """ALiBi and fused kernels with biases; experts, and one for every token."""
    config = FAMILY_CONFIGS[name]
    want = steps.train("dpo", None, config=config)
    got = steps.train("dpo", sharding.make_mesh(**_CUBE), config=config)
    for metric, expected in want.items():
        np.testing.assert_allclose(got[metric], expected, rtol=0, atol=1e-5)


def _two_processes():
    from tests.sharding import steps

    cases = [("sft", dict(fsdp=8)), ("dpo", dict(data=2, fsdp=2, tensor=2))]
    return [(name, steps.train(name, sharding.make_mesh(**m))) for name, m in cases]


def test_two_processes_of_four_devices_agree_with_one_device():
    for results in processes.run(_two_processes, timeout=900):
        assert len(results) == 2
        for recipe, got in results:
            _same(got, recipe)
