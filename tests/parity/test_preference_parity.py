"""Live comparison of the preference losses with TRL; runs where it is installed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.losses import test_golden_preference as golden_test

pytest.importorskip("torch")
pytest.importorskip("trl")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_golden_preference.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_golden_preference", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def live(script):
    inputs = script.make_inputs()
    return inputs, script.trl_values(inputs)


def test_jalign_computes_what_trl_computes_now(live):
    golden_test.test_values_and_gradients_are_those_of_trl(live)
    golden_test.test_statistics_of_the_batch_are_of_all_of_it(live)
    golden_test.test_extremes_at_which_trl_overflows_stay_finite(live)
    golden_test.test_the_moving_reference_and_the_collision_entropy_are_those_of_trl(
        live
    )


def test_the_committed_values_are_those_of_trl_now(live):
    inputs, golden = golden_test.load()
    for name, x in live[0].items():
        np.testing.assert_array_equal(inputs[name], x, err_msg=name)
    assert set(golden) == set(live[1])
    golden_test.assert_same(live[1], golden)


def test_trl_cannot_differentiate_its_hinge_with_wpo_weights(script):
    """Why no golden value has the two together; jalign's product is like any other."""
    inputs = script.make_inputs()
    with pytest.raises(RuntimeError, match="inplace"):
        script._with_gradient(
            "hinge",
            lambda x: script._dpo(
                inputs, slice(None), x, ["hinge"], [1.0], modifier="wpo"
            ),
            inputs["logps"],
        )
