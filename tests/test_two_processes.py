"""Two processes that train as one, and every command killed and continued.

Everything goes through the command, as a user's job would. What is killed, and what
has a partner, is a process of its own; what they are compared with runs in this one.
"""

import json
import signal
from pathlib import Path

import pytest

from tests.command_process import finish, start
from tests.sharding.processes import free_port
from tests.train import world

STEPS, AT = 8, 6  # a checkpoint every two: the first is on disk when the third begins
SHARED = ("--steps", str(STEPS), "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


def flags(command: str, here: Path) -> tuple[str, ...]:
    reward = ("--reward", f"{here / 'reward.py'}:share_of_a", "--max-new-tokens", "8")
    return (*SHARED, *(reward if command == "ppo" else ()))


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """command -> OUT of an uninterrupted run of one process, made when asked for."""
    outs = {}

    def of(command):
        if command not in outs:
            outs[command] = out = tmp_path_factory.mktemp(command)
            assert world.run(command, here, out, *flags(command, here)) == 0
        return outs[command]

    return of


def measured(out: Path, name: str = "loss") -> list[float]:
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)[name] for line in lines]


@pytest.mark.slow
def test_two_processes_train_as_one_does(here, whole, tmp_path):
    """Two commands after another in the same pair: the second finds it joined."""
    commands = ("sft", "dpo")
    hosts = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2")

    def words(index):
        for command in commands:
            # An empty --mesh is the default: all four devices.
            given = ("--mesh", "", *flags(command, here), *hosts)
            more = ("--process-id", str(index))
            more += ("--cpu-devices", "2") if command == "sft" else ()
            yield world.words(command, here, tmp_path / command, *given, *more)

    both = [start(*words(index)) for index in range(2)]
    texts = [finish(process) for process in both]
    assert "loss" in texts[0] and "loss" not in texts[1], "only process 0 speaks"
    for command in commands:
        one, two = measured(whole(command)), measured(tmp_path / command)
        assert two == pytest.approx(one, rel=1e-4), command
        one, two = world.weights(whole(command)), world.weights(tmp_path / command)
        assert two.keys() == one.keys()
        for name, array in one.items():
            assert abs(two[name] - array).max() < 1e-5, (command, name)


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
def test_a_killed_run_continues_to_identical_weights(
    command, how, here, whole, tmp_path, capsys
):
    given = flags(command, here)
    # As many devices as here: the programs that it compiles are the same, and kept.
    killed = world.words(command, here, tmp_path, *given, "--cpu-devices", "8")
    code = 75 if how == signal.SIGTERM else -signal.SIGKILL
    finish(start(killed, signal=(how, AT)), code)
    assert not (tmp_path / "model").exists(), "it was killed too late"
    assert len(measured(tmp_path, "step")) >= AT - 1
    capsys.readouterr()
    assert world.run(command, here, tmp_path, *given) == 0
    assert "continuing from step" in capsys.readouterr().err
    name = "reward" if command == "ppo" else "loss"
    one, other = whole(command), tmp_path
    assert measured(other, name) == measured(one, name)
    one, other = world.weights(one), world.weights(other)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
