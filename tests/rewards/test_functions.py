"""Tests for jalign/rewards/functions.py."""

import copy
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jalign import rewards
from jalign.demo import ASSETS

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
    with pytest.raises(ValueError, match="not FILE.py:FUNCTION"):
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
        ([1.0, 1e300, 2.0], r"gave 1e\+300 for row 1, not a finite float32"),
        (np.array([1.0, 2.0, -1e39]), r"gave -1e\+39 for row 2"),
        ([10**400, 1, 1], "gave 1000.* for row 0"),
        ([1.0, 1j, 2.0], "gave 1j for row 1"),
        (np.array([1.0, 1j, 2.0]), r"gave \(?1\+0j\)? for row 0|gave 1j for row 1"),
        (np.array([[1.0], [2.0], [3.0]]), r"gave \[1.0\] for row 0"),
        (np.float32(1.0), "gave a float32, not 3 numbers"),
        ({1.0, 2.0, 3.0}, "gave a set"),
        (b"abc", "gave a bytes"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "gave a dict"),
        (iter([1.0, 2.0, 3.0]), "gave a list_iterator"),
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


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, StopIteration])
def test_a_function_that_leaves_is_an_error_with_the_row(kind, timeout):
    def leave(prompts, completions, rows):
        if "bb" in completions:
            raise kind(0)
        return [1.0] * len(rows)

    message = f"mine raised {kind.__name__}: 0 .row 1 of 3: .*'bb'"
    with pytest.raises(ValueError, match=message):
        rewards.checked(leave, name="mine", timeout=timeout)(*BATCH)


def test_control_c_is_not_the_functions():
    def interrupted(prompts, completions, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewards.checked(interrupted)(*BATCH)
    with pytest.raises(ValueError, match="raised KeyboardInterrupt"):
        rewards.checked(interrupted, timeout=5.0)(*BATCH)


def test_what_a_function_does_to_its_rows_stays_its_own():
    def greedy(prompts, completions, rows):
        for row in rows:
            row["n"] = row["deep"]["n"] = 9
        rows.clear()
        prompts.clear()
        completions[:] = ["x"] * 7
        return [1.0, 2.0, 3.0]

    batch = (["p"] * 3, ["a", "b", "c"], [{"n": i, "deep": {"n": i}} for i in range(3)])
    before = copy.deepcopy(batch)
    assert rewards.checked(greedy)(*batch).tolist() == [1.0, 2.0, 3.0]
    assert batch == before


def test_the_search_for_the_row_ends_in_time():
    def slow_alone(prompts, completions, rows):
        if len(rows) > 1:
            raise RuntimeError("batch")
        time.sleep(0.2)
        return [1.0]

    many = (["p"] * 50, ["c"] * 50, [{}] * 50)
    start = time.monotonic()
    with pytest.raises(ValueError, match="raised RuntimeError: batch"):
        rewards.checked(slow_alone, timeout=0.5)(*many)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_nothing_can_wait_for_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout must be > 0 seconds"):
        rewards.checked(len, timeout=timeout)


def test_a_sum_that_overflows_names_the_row():
    large = rewards.checked(lambda *batch: [1.0, 3e38, 2.0])
    with pytest.raises(ValueError, match="row 1 adds up .* to inf"):
        rewards.weighted_sum([large, large], [1.0, 1.0])(*BATCH)


FAULTS = {
    "leave": "import sys; sys.exit(0)",
    "hang": "import time; time.sleep(1000)",
    "overflow": "return [1e300] * len(rows)",
}
WORDS = {
    "leave": "raised SystemExit: 0 (row 0 of 2",
    "hang": "did not return within 0.5 s",
    "overflow": "gave 1e+300 for row 0",
}


def test_the_command_ends_with_2_and_one_message(tmp_path):
    """In one process, so that a hanging thread must not keep it."""
    source = [
        f"def {k}(prompts, completions, rows):\n    {v}\n" for k, v in FAULTS.items()
    ]
    file, leaves = tmp_path / "faulty.py", tmp_path / "leaves.py"
    file.write_text("".join(source))
    leaves.write_text("raise SystemExit(0)")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    model = str(ASSETS / "model")
    flags = ["--model", model, "--data", str(rows), "--max-new-tokens", "2"]
    flags += ["--reward-timeout", "0.5", "--mesh", "fsdp=1"]
    sources = [*(f"{file}:{name}" for name in FAULTS), f"{leaves}:f"]
    code = f"""
from jalign import cli
for source in {sources!r}:
    print(cli.main(["eval", "--reward", source, *{flags!r}]))
for command in ("ppo", "grpo"):
    flags = ["--model", "m", "--data", "d", "--out", "o", "--reward", "gsm8k"]
    print(cli.main([command, *flags, "--reward-timeout", "0"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert run.stdout.split() == ["2"] * 6 and run.returncode == 0, run.stderr
    messages = [*WORDS.values(), "leaves.py cannot be run: SystemExit: 0"]
    for message in messages:
        assert message in run.stderr
    assert run.stderr.count("reward_timeout must be > 0 seconds, got 0") == 2
    assert run.stderr.count(str(file)) == len(FAULTS)
    assert "Traceback" not in run.stderr


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2, 1\]"):
        rewards.checked(lambda *batch: [1.0])(["p"], ["a", "b"], [{}])
