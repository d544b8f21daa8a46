"""The code of docs/policy_gradients.md, run, against TRL's values."""

import re
from pathlib import Path

import numpy as np
import pytest

from jalign import losses, rewards
from jalign.train.loss_table import REGISTRY
from tests.losses.test_golden_policy import GROUP_IDS, WEIGHTS, load, policy_recipes

TEXT = (Path(__file__).parents[2] / "docs" / "policy_gradients.md").read_text("utf-8")


@pytest.fixture(scope="module")
def documented():
    inputs, _ = load()
    applies = ~np.isnan(inputs["rewards"])
    inputs["rewards"] = np.where(applies, inputs["rewards"] * WEIGHTS, 0).sum(1)
    names = dict(inputs, group_ids=GROUP_IDS, scored=applies.any(1))
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    return inputs, names


def test_recipes_are_those_held_to_trl(documented):
    inputs, names = documented
    for name, advantages in [
        ("grpo_kl", names["advantages"]),
        ("dapo", names["advantages"]),
        ("gspo", names["advantages"]),
        ("luspo", names["advantages"]),
        ("dr_grpo", names["centered"]),
    ]:
        recipes = policy_recipes(dict(inputs, advantages=np.asarray(advantages)))
        want = recipes[name](inputs["logps"])
        np.testing.assert_allclose(names[name], want, rtol=1e-5, err_msg=name)


def test_distillation_recipes_lie_between_one_another(documented):
    _, names = documented
    assert 0 < names["gkd"] < min(names["forward_kl"], names["reverse_kl"])


def test_every_name_in_the_text_exists():
    for name in set(re.findall(r"losses\.(\w+)\(", TEXT)):
        assert name in losses.__all__, name
    table = [line for line in TEXT.splitlines() if line.startswith("|")]
    named = re.findall(r"`(\w+_\w+)[`(]|(\w+_\w+)\(", "\n".join(table))
    assert len(named) > 30
    known = {*losses.__all__, *rewards.__all__, *REGISTRY["grpo"]}
    assert {a or b for a, b in named} <= known
