"""Two processes that train as one, and every command killed and continued.

Everything goes through the command, as a user's job would.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jalign.demo import ASSETS
from tests.sharding.processes import free_port

TIMEOUT = 300
COMMON = ["--model", str(ASSETS / "model"), "--batch-size", "8", "--max-length", "64"]
COMMON += ["--checkpoint-every", "2"]
DATA = {
    "sft": "sft_train.jsonl",
    "reward": "preferences_train.jsonl",
    "dpo": "preferences_train.jsonl",
    "ppo": "prompts_train.jsonl",
}
REWARD = """
def length(prompts, completions, rows):
    return [-float(len(text)) for text in completions]
"""


def start(command: str, out: Path, *more: str) -> subprocess.Popen:
    # A few rows are enough: dpo asks the reference about every one before it starts.
    data = out.parent / DATA[command]
    rows = (ASSETS / DATA[command]).read_text("utf-8").splitlines(keepends=True)
    data.write_text("".join(rows[:64]), "utf-8")
    words = [sys.executable, "-m", "jalign", command, "--data", str(data)]
    words += [*COMMON, "--out", str(out), *more]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, text
    return text


def measured(out: Path, name: str = "loss") -> list[float]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)[name] for line in lines]


def weights(out: Path) -> dict:
    return {
        name: array
        for file in sorted((out / "model").glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_two_processes_train_as_one_does(command, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    hosts = ["--coordinator", address, "--num-processes", "2"]
    both = [
        start(
            command,
            tmp_path / "two",
            *(*hosts, "--process-id", str(i), "--cpu-devices", "2", "--steps", "3"),
        )
        for i in range(2)
    ]
    texts = [finish(process) for process in both]
    finish(start(command, tmp_path / "one", "--steps", "3"))
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert "loss" in texts[0] and "loss" not in texts[1], "only process 0 speaks"
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert two.keys() == one.keys()
    for name, array in one.items():
        assert abs(two[name] - array).max() < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, how",
    [
        ("sft", signal.SIGTERM),
        ("reward", signal.SIGTERM),
        ("dpo", signal.SIGKILL),
        ("ppo", signal.SIGKILL),
    ],
)
def test_a_killed_run_continues_to_identical_weights(command, how, tmp_path):
    # Steps enough that a fast machine is still at work when the signal comes.
    more = ["--steps", "24", "--cpu-devices", "1"]
    if command == "ppo":
        (tmp_path / "reward.py").write_text(REWARD, "utf-8")
        more += ["--reward", f"{tmp_path / 'reward.py'}:length"]
        more += ["--max-new-tokens", "16"]
    finish(start(command, tmp_path / "whole", *more))
    process = start(command, tmp_path / "cut", *more)
    deadline = time.monotonic() + TIMEOUT
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    finish(process, code=75 if how == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "cut" / "model").exists(), "it was killed too late"
    text = finish(start(command, tmp_path / "cut", *more))
    assert "continuing from step" in text
    name = "reward" if command == "ppo" else "loss"
    assert measured(tmp_path / "cut", name) == measured(tmp_path / "whole", name)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all((whole[name] == cut[name]).all() for name in whole)
