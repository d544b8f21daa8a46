"""The compiler's account of the real step, here on the virtual devices."""

import importlib.util

import pytest

from jalign import plan

from .test_estimate import TINY, _bytes


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_arguments_are_the_state_and_the_batch(recipe):
    settings: dict = dict(max_length=16, mesh="fsdp=8", batch_size=8)
    if recipe in ("ppo", "grpo"):
        settings |= {"max_new_tokens": 8}
    if recipe == "grpo":
        settings |= {"group_size": 2, "num_minibatches": 2}  # 8 rows an update
    result = plan.plan(recipe, TINY, **settings, compile=True)
    rows = {row.name: row.bytes for row in result.compiled}
    prefix = "policy " if recipe in ("ppo", "grpo") else ""
    state = sum(
        _bytes(result, prefix + name) for name in ("parameters", "optimizer state")
    )
    assert state <= rows["arguments"] <= state + 2048
    assert rows["temporaries"] > 0
    assert "peak (compiled)" in str(result)
    # A CPU's module tells what is sent, and no cycles.
    assert "all-gather" in {part.name for part in result.compiled_sent}
    assert result.compiled_speed is None


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_a_tpu_slice_is_compiled_for_without_a_tpu():
    settings = dict(topology="v5e:2x2", max_length=256, mesh="fsdp=4", compile=True)
    found = plan.plan("sft", TINY, **settings)
    assert found.fits and found.compiled_sent
    assert found.compiled_speed and found.compiled_speed.seconds > 0
