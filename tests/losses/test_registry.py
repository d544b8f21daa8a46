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
        reads_mask = "mask" in entry.inputs
        assert entry.whole_batch == reads_mask, (command, name)
