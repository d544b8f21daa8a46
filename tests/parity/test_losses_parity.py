"""Live comparison with torch and TRL; runs where both are installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.losses import test_golden

pytest.importorskip("torch")
pytest.importorskip("trl")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_golden.py"


@pytest.fixture(scope="module")
def golden_script():
    spec = importlib.util.spec_from_file_location("make_golden", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jalign_computes_what_trl_computes_now(golden_script):
    inputs = golden_script.make_inputs()
    trl = golden_script.trl_values(inputs)
    test_golden.assert_same(test_golden.jalign_values(inputs), trl)


def test_the_committed_values_are_those_of_trl_now(golden_script):
    inputs, golden = test_golden.load()
    for name, x in golden_script.make_inputs().items():
        np.testing.assert_array_equal(inputs[name], x, err_msg=name)
    test_golden.assert_same(golden_script.trl_values(inputs), golden)
