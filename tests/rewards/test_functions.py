"""Tests for jalign/rewards/functions.py."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from jalign import rewards

BATCH = (["p0", "p1", "p2"], ["a", "bb", "ccc"], [{"n": 0}, {"n": 1}, {"n": 2}])

SOURCE = """
import numpy as np

LIMIT = 3

def length_reward(prompts, completions, rows):
    return [len(c) for c in completions]

def from_rows(prompts, completions, rows):
    return np.array([r["n"] + 0.5 for r in rows])

if __name__ == "__main__":
    raise SystemExit("not when it is loaded")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(SOURCE)
    return path


def test_load_reward_runs_the_function(file):
    got = rewards.load_reward(f"{file}:length_reward")(*BATCH)
    assert got.dtype == np.float32 and got.tolist() == [1.0, 2.0, 3.0]
    got = rewards.load_reward(f"{file}:from_rows")(*BATCH)
    assert got.tolist() == [0.5, 1.5, 2.5]


def test_load_reward_names_what_is_wrong(file, tmp_path):
    with pytest.raises(ValueError, match="not FILE.py:FUNCTION"):
        rewards.load_reward(str(file))
    with pytest.raises(FileNotFoundError, match="nowhere.py"):
        rewards.load_reward(f"{tmp_path}/nowhere.py:f")
    with pytest.raises(ValueError, match="did you mean length_reward"):
        rewards.load_reward(f"{file}:lenght_reward")
    with pytest.raises(ValueError, match="it has: length_reward, from_rows"):
        rewards.load_reward(f"{file}:xyz")
    with pytest.raises(ValueError, match="no function LIMIT"):
        rewards.load_reward(f"{file}:LIMIT")
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with pytest.raises(ValueError, match="broken.py cannot be run: SyntaxError"):
        rewards.load_reward(f"{broken}:f")
    text = tmp_path / "notes.txt"
    text.write_text("x")
    with pytest.raises(ValueError, match="not a Python file"):
        rewards.load_reward(f"{text}:f")


@pytest.mark.parametrize(
    "value, message",
    [
        ([1.0, float("nan"), 2.0], "gave nan for row 1"),
        ([1.0, 2.0, float("inf")], "gave inf for row 2"),
        ([1.0, None, 2.0], "gave None for row 1"),
        ([1.0, "2", 2.0], "gave '2' for row 1"),
        ([1.0, [2.0], 2.0], r"gave \[2.0\] for row 1"),
        ([1.0, 2.0], "gave 2 rewards for 3 rows"),
        ("abc", "gave a str"),
        (1.0, "gave a float"),
        (None, "gave a NoneType"),
    ],
)
def test_results_that_are_no_rewards_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        rewards.checked(lambda *batch: value, name="mine")(*BATCH)


@pytest.mark.parametrize(
    "value",
    [
        [1, True, 0.5],
        (1.0, 1.0, 0.5),
        np.array([1.0, 1.0, 0.5]),
        jnp.array([1.0, 1.0, 0.5]),
        [np.float32(1.0), jnp.float32(1.0), np.array(0.5)],
    ],
)
def test_results_may_be_numbers_of_any_kind(value):
    got = rewards.checked(lambda *batch: value)(*BATCH)
    assert got.dtype == np.float32 and got.tolist() == [1.0, 1.0, 0.5]


def test_a_function_that_raises_is_an_error_with_the_row():
    def divide(prompts, completions, rows):
        return [1 / (row["n"] - 1) for row in rows]

    with pytest.raises(ValueError, match="mine raised ZeroDivisionError.*row 1 of 3"):
        rewards.checked(divide, name="mine")(*BATCH)

    def only_together(prompts, completions, rows):
        assert len(rows) == 1

    with pytest.raises(ValueError, match="on none of them alone"):
        rewards.checked(only_together)(*BATCH)


def test_a_function_that_hangs_times_out():
    start = time.monotonic()
    slow = rewards.checked(lambda *batch: time.sleep(5), name="mine", timeout=0.1)
    with pytest.raises(TimeoutError, match="mine did not return within 0.1 s"):
        slow(*BATCH)
    assert time.monotonic() - start < 3
    quick = rewards.checked(lambda *batch: [1, 2, 3], timeout=10)
    assert quick(*BATCH).tolist() == [1, 2, 3]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2, 1\]"):
        rewards.checked(lambda *batch: [1.0])(["p"], ["a", "b"], [{}])
