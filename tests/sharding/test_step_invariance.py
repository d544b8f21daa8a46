"""SFT and DPO steps give the same loss and parameters on every mesh."""

import functools

import numpy as np
import pytest

from jalign import sharding

from . import processes, steps


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


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("recipe", ["sft", "dpo"])
@pytest.mark.parametrize(
    "sizes", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)], ids=str
)
def test_one_device_and_a_mesh_agree(recipe, sizes, microbatches):
    if microbatches == 2 and sizes == dict(fsdp=8):
        pytest.skip("one row on each device: nothing to cut")
    _same(steps.train(recipe, sharding.make_mesh(**sizes), microbatches), recipe)


def _two_processes():
    from tests.sharding import steps

    results = []
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)):
        mesh = sharding.make_mesh(**sizes)
        results += [(name, steps.train(name, mesh)) for name in ("sft", "dpo")]
    return results


def test_two_processes_of_four_devices_agree_with_one_device():
    for results in processes.run(_two_processes):
        assert len(results) == 4
        for recipe, got in results:
            _same(got, recipe)
