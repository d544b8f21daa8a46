"""Tests for jalign/losses/registry.py."""

import inspect

import jax
import numpy as np
import pytest

from jalign.losses.registry import REGISTRY
from tests.losses import test_golden_policy as trl

ROWS = [(c, name, e) for c, table in REGISTRY.items() for name, e in table.items()]


@pytest.mark.parametrize(("command", "name", "entry"), ROWS)
def test_an_entry_fits_its_function(command, name, entry):
    parameters = inspect.signature(entry.function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    scalars = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert set(entry.defaults) | set(entry.keywords) <= scalars
    # Averages stand where the function's docstring asks for averages or any score.
    names = [i.replace("average_", "") for i in entry.inputs]
    assert len(names) == len(positional)
    if name != "sft":
        assert names == positional


def test_a_loss_that_sorts_the_batch_says_so():
    for command, name, entry in ROWS:
        reads_rows = "mask" in entry.inputs and command != "grpo"  # there of tokens
        assert entry.whole_batch == reads_rows, (command, name)


def test_policy_losses_alone_say_how_they_are_averaged():
    for command, name, entry in ROWS:
        said = (entry.advantages is not None, entry.reduction is not None)
        assert said == (command == "grpo",) * 2, (command, name)


@pytest.mark.parametrize("name", sorted(set(REGISTRY["grpo"]) - {"reinforce"}))
def test_a_policy_loss_with_its_reduction_is_trls(name):
    """Value and gradient; reinforce is no loss of TRL's."""
    inputs, golden = trl.load()
    entry, mask = REGISTRY["grpo"][name], inputs["mask"]
    per_token = np.where(mask, inputs["advantages"][:, None], np.float32(0))
    arrays = inputs | {"advantages": per_token}
    options = dict(entry.defaults)
    if "clip_eps" in options:
        options |= trl.CLIP
    own = {"cispo": {"max_ratio": 1.6}, "gmpo": {"clip_eps": 0.4, "clip_eps_high": 0.3}}
    options |= own.get(name, {})
    length = {"length": trl.LENGTH} if name == "dr_grpo" else {}

    def mean(logps):
        given = arrays | {"logps": logps}
        loss = entry.function(*(given[k] for k in entry.inputs), **options)
        total, count = entry.reduction(loss, mask, **length)
        return total / count

    value, grad = jax.jit(jax.value_and_grad(mean))(inputs["logps"])
    np.testing.assert_allclose(value, golden[name], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(grad, golden[f"{name}_grad"], rtol=1e-5, atol=2e-6)
