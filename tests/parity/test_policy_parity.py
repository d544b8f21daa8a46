"""Live comparison with TRL's policy losses and advantages; runs where TRL is."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.losses import test_golden_policy

pytest.importorskip("torch")
pytest.importorskip("trl")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_golden_policy.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_golden_policy", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trl(script):
    return script.trl_values(script.make_inputs())


def test_jalign_computes_what_trl_computes_now(script, trl):
    inputs = script.make_inputs()
    values = test_golden_policy.jalign_values(inputs)
    test_golden_policy.assert_same(values, trl, inputs["mask"])


def test_the_committed_values_are_those_of_trl_now(script, trl):
    inputs, golden = test_golden_policy.load()
    for name, x in script.make_inputs().items():
        np.testing.assert_array_equal(inputs[name], x, err_msg=name)
    assert set(golden) == set(trl)
    for name, want in golden.items():
        np.testing.assert_allclose(trl[name], want, rtol=1e-6, atol=1e-6)
