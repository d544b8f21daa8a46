"""Few shapes in a run, whatever its rows: counted through the commands."""

import json
import re

import numpy as np
import pytest

from jalign import data
from jalign.train.shapes import choose_shapes, cut, longest_shapes
from jalign.types import Rollout
from tests.sharding.test_compiling import compiled  # noqa: F401
from tests.train import world
from tests.train.ppo_world import WORDS, make_config

LETTERS = WORDS[3:]
# What the commands compile of their own, as jax calls it.
OURS = ("step", "_loss_sums", "_margin_sums", "_reference_pass", "complete")
OURS += ("token_logps", "policy_pass", "token_values")


def text(count: int, first: int) -> str:
    return " ".join(LETTERS[(first + i * i) % len(LETTERS)] for i in range(count))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """The tiny world with rows of 2 to 70 words, most of them short."""
    folder = world.make(tmp_path_factory.mktemp("uneven"))
    rows = {"rows": [], "pairs": [], "prompts": []}
    for i in range(48):
        many = 2 + i * 7 % 9 + (50 if i % 12 == 0 else 0)
        prompt, yes, no = text(many, i), text(1 + many // 3, i + 1), text(2, i + 2)
        rows["rows"].append({"prompt": prompt, "completion": f" {yes}"})
        rows["pairs"].append({"prompt": prompt, "chosen": yes, "rejected": no})
        rows["prompts"].append({"prompt": prompt})
    for name, lines in rows.items():
        for path, some in ((name, lines[7:]), (f"held_{name}", lines[:7])):
            out = "".join(json.dumps(line) + "\n" for line in some)
            (folder / f"{path}.jsonl").write_text(out, encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", ["sft", "dpo", "ppo", "grpo"])
def test_a_run_compiles_few_shapes_and_says_each(
    command,
    uneven,
    tmp_path,
    capsys,
    compiled,  # noqa: F811
):
    name = {"sft": "rows", "dpo": "pairs"}.get(command, "prompts")
    flags = ["--eval-data", str(uneven / f"held_{name}.jsonl"), "--max-length", "96"]
    flags += ["--steps", "12"]
    if command in ("ppo", "grpo"):
        reward = f"{uneven / 'reward.py'}:share_of_a"
        flags += ["--reward", reward, "--max-new-tokens", "5", "--num-epochs", "2"]
    if command == "grpo":
        flags += ["--group-size", "2", "--beta", "0.1"]
    assert world.run(command, uneven, tmp_path, *flags) == 0
    said = re.findall(r"^compiling (.*), once$", capsys.readouterr().err, re.M)
    assert len(said) == len(set(said))
    done = [n for n in compiled if n.removeprefix("jit(").rstrip(")") in OURS]
    assert len(said) == len(done), (said, done)
    kinds = [re.split(r" for ", what)[0] for what in said]
    assert 1 <= kinds.count("the training step") <= 2
    assert kinds.count("the critic's training step") <= 2
    assert kinds.count("sampling") <= 2
    for kind in set(kinds) - {"the training step", "the critic's training step"}:
        assert kind == "sampling" or kinds.count(kind) == 1, kinds


def prompts(*lengths):
    return [data.PromptExample(np.ones(n, np.int32), "", {}) for n in lengths]


def test_shapes_hold_all_prompts_and_their_completions():
    config = make_config(max_length=512, batch_size=2)
    shapes = choose_shapes(prompts(*[5] * 30, 90), prompts(200), config)
    assert shapes == ((16, 256), (16, 256))
    assert choose_shapes(prompts(*[5] * 30), [], config) == ((16,), (16,))
    assert longest_shapes(config) == ((504,), (512,))


def test_a_step_takes_the_shortest_rows_that_hold_its_own():
    used = np.zeros((3, 64), np.int32)
    used[0, :9], used[1, :16] = 1, 1
    rollout = Rollout(used, used > 0, used, used, *[None] * 3, used * 0.5, None)
    for rows, length in (([0], 16), ([1], 16), ([2], 16), ([0, 1], 16)):
        part = Rollout(*(x if x is None else x[rows] for x in rollout))
        assert cut(part, (16, 64)).tokens.shape == (len(rows), length)
    used[1, 16] = 1
    assert cut(rollout, (16, 64)).advantages.shape == (3, 64)
