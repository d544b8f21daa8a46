"""Tests for jalign/losses/registry.py."""

import inspect

import pytest

from jalign.losses.registry import REGISTRY

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
