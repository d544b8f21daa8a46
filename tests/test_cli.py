"""Tests for jalign/cli.py and cli_options.py: parsing, YAML, --help, exit codes."""

import contextlib
import dataclasses
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import pytest

from jalign import cli, cli_options, sharding
from jalign.settings import flags_of
from jalign.train.loss_table import REGISTRY

# tyro warns of defaults that are not of the type that it was told.
pytestmark = pytest.mark.filterwarnings("error::UserWarning:tyro")


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8


@dataclasses.dataclass(frozen=True)
class Config:
    model: str
    steps: int | None = None
    """Not `learning_rate` of steps."""
    resume: bool = True
    choice: Literal["a", "b"] | None = None
    """As in "x:learning_rate=1"."""
    rows: str | Path | list[dict] | None = None
    words: tuple[str, ...] = ()
    optim: Inner = dataclasses.field(default_factory=lambda: Inner(eps=1e-3))


@pytest.fixture
def command(monkeypatch):
    """Registers `jalign probe`, which keeps the config that it was called with."""
    import types

    seen: list[Config] = []
    module = types.SimpleNamespace(Config=Config, run=seen.append)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe", "Config", "run", "probes"))
    real = cli.importlib.import_module
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda n: module if n == "probe" else real(n)
    )
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)
    return seen


def yaml_file(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_yaml_and_scientific_notation_is_a_number(command, tmp_path):
    text = "model: a\nlearning_rate: 1e-5\nresume: false\nsteps: 7\nbetas: [0.5, 0.6]\n"
    path = yaml_file(tmp_path, text)
    assert cli.main(["probe", "--steps", "9", "--config", path]) == 0
    want = Config("a", 9, False, optim=Inner(1e-5, (0.5, 0.6), 1e-3))
    assert command == [want]


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: a\nlearning-rte: 1\n", ["learning-rte", "learning_rate"]),
        ("model: a\nmodel: b\n", ["'model'", "twice"]),
        ("- a\n", ["name: value"]),
        ("model: [a\n", ["not valid YAML"]),
        ("optim: {learning_rate: 1}\n", ["unknown key 'optim'"]),
    ],
)
def test_bad_yaml_names_the_file_and_the_key(command, tmp_path, capsys, text, words):
    path = yaml_file(tmp_path, text)
    assert cli.main(["probe", "--config", path]) == cli.EXIT_USER
    error = capsys.readouterr().err
    assert path in error and all(word in error for word in words)
    assert "Traceback" not in error and command == []


def test_missing_files_and_commands_are_one_line_and_exit_2(command, capsys):
    assert cli.main(["probe", "--config", "nowhere.yaml"]) == cli.EXIT_USER
    assert "nowhere.yaml" in capsys.readouterr().err
    assert cli.main(["stf"]) == cli.EXIT_USER
    assert "did you mean 'sft'" in capsys.readouterr().err
    assert cli.main(["probe", "--model", "a", "--stps", "3"]) == cli.EXIT_USER
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss", "grop"], "did you mean 'grpo'"),
        (["--group-size", "1"], "group_size must be >= 2"),
        (["--reward", "f.py:a + f.py:a"], "'f.py:a' is given twice"),
        (["--batch-size", "3", "--num-minibatches", "5"], "= 24 must be a multiple"),
        (["--loss", "reinforce", "--num-epochs", "2"], "must be 1, got 2"),
    ],
)
def test_contradictions_of_grpo_are_one_message_and_exit_2(flags, words, capsys):
    needed = ["--model", "m", "--data", "d", "--out", "o", "--reward", "gsm8k"]
    assert cli.main(["grpo", *needed, *flags]) == cli.EXIT_USER
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert error.startswith("error: jalign grpo: ") and error.count("\n") == 1


def test_a_library_error_is_a_bug_with_its_traceback(command, monkeypatch, capsys):
    def run(name, args):
        raise ValueError("from a library")  # raised outside the package

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["probe"]) == cli.EXIT_BUG
    assert "Traceback" in capsys.readouterr().err


HEADING = r"(?m)^\W*(\w[\w ]*?) options\W*$"  # framed with UTF-8, else bare


def words_of(text):
    """Without the lines of the boxes around it."""
    return " ".join(re.sub("[│|]", " ", text).split())


def config_of(name):
    module, config, *_ = cli.COMMANDS[name]
    return getattr(importlib.import_module(module), config)


@pytest.fixture(scope="module", params=list(cli.COMMANDS))
def help_of(request):
    """(command, what its --help prints on a terminal of 80 columns)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main([*request.param.split(), "--help"]) == 0
    return request.param, out.getvalue()


def test_help_is_complete_and_in_the_words_of_a_terminal(help_of):
    name, text = help_of
    for field in (*flags_of(config_of(name)), "coordinator"):
        assert f"--{field.replace('_', '-')}" in text
    assert "--config FILE.yaml" in text and text.startswith(f"usage: jalign {name}")
    for word in ("None", "docs/", "(default: )", "'')", "True)", "False)"):
        assert word not in text, word
    assert max(map(len, text.splitlines())) <= 80
    headings = set(re.findall(HEADING, text))
    assert {"run", "launch"} <= headings
    if cli.COMMANDS[name][0] == "jalign.train":
        assert {"data", "optimizer", "memory and time"} <= headings
    if name in ("ppo", "grpo"):
        assert "sampling" in headings
    assert all(re.fullmatch("[A-Za-z ]+", heading) for heading in headings)
    assert not {"optim", "compute", "kl", "rewards", "config"} & headings


def test_help_ends_in_an_example_that_the_command_takes(help_of):
    name, text = help_of
    shown = text.rpartition("\nexample: ")[2]
    words, first = shlex.split(shown.replace("\\\n", " ")), ["jalign", *name.split()]
    words, said = words[len(first) :], words[: len(first)]
    assert said == first and words
    config, launch = cli_options.parse(name, words, config_of(name), cli.Launch)
    assert type(config) is config_of(name) and launch == cli.Launch()


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n != "demo"])
def test_what_has_to_be_given_stands_first(name):
    for group in cli_options.groups_of(config_of(name), "run").values():
        given = [option.default is dataclasses.MISSING for option in group.options]
        assert given == sorted(given, reverse=True)


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n != "demo"])
def test_every_option_is_explained(name):
    """But the lengths of the demo's stages, whose names say all."""
    for heading, group in cli_options.groups_of(config_of(name), "run").items():
        assert heading == "run" or group.text
        assert not [option.name for option in group.options if not option.text]


def test_help_names_the_losses_of_the_command(help_of):
    name, text = help_of
    words = words_of(text)
    names = ", ".join(REGISTRY.get(name, ()))
    assert not names or f"Names: {names}." in words


def test_help_says_what_is_unset_and_takes_the_python_word_for_it(command, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        assert cli.main(["probe", "--help"]) == 0
    text = capsys.readouterr().out
    words = words_of(text)
    assert "--steps INT Not --learning-rate of steps. (default: unset)" in words
    assert '--choice {a,b} As in "x:learning_rate=1". (default: unset)' in words
    assert "--resume, --no-resume (default: on)" in words
    assert "--rows STR (default: unset)" in words
    assert "optimizer" in re.findall(HEADING, text)
    assert cli.main(["probe", "--model", "a", "--steps", "None"]) == 0
    assert command == [Config("a")]


@pytest.mark.parametrize("flag", ["--steps", "--choice"])
def test_a_wrong_value_of_an_optional_flag_is_told_without_none(command, capsys, flag):
    assert cli.main(["probe", "--model", "a", flag, "x"]) == cli.EXIT_USER
    error = words_of(capsys.readouterr().err)
    assert f"Error parsing {flag}" in error and "'x'" in error
    assert "None" not in error and command == []


def test_rows_are_a_text_and_words_are_several(command):
    flags = ["--rows", "a.jsonl", "--words", "x", "y z"]
    assert cli.main(["probe", "--model", "a", *flags]) == 0
    assert command == [Config("a", rows="a.jsonl", words=("x", "y z"))]


def test_defaults_are_those_of_the_config_that_holds_them(command):
    assert cli.main(["probe", "--model", "a"]) == 0
    assert command == [Config("a")] and command[0].optim.eps == 1e-3


def test_an_error_of_a_config_is_one_line_without_a_frame(capsys):
    needed = ["--model", "m", "--data", "d", "--out", "o", "--steps", "0"]
    assert cli.main(["sft", *needed]) == cli.EXIT_USER
    error = capsys.readouterr().err
    assert error.startswith("error: jalign sft: steps must be") and "╭" not in error


@pytest.mark.parametrize("words", ["", "sft --help"])
def test_a_closed_standard_output_ends_a_command_quietly(words):
    """As `jalign ... | head` leaves it: the exit code of SIGPIPE, and no message."""
    command = [sys.executable, "-m", "jalign", *words.split()]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == cli.EXIT_PIPE == 141


def test_virtual_devices_have_threads_for_collectives_that_wait(monkeypatch):
    for owner, name in (
        (jax.config, "update"),
        (sharding, "initialize"),
        (sharding, "give_back_compiler_memory"),
        (cli, "setup_logging"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: None)
    monkeypatch.setenv("PJRT_NPROC", "3")
    cli.start_jax(cli.Launch(cpu_devices=8))
    assert os.environ["PJRT_NPROC"] == "3"
    monkeypatch.delenv("PJRT_NPROC")
    cli.start_jax(cli.Launch())
    assert "PJRT_NPROC" not in os.environ
    cli.start_jax(cli.Launch(cpu_devices=8))
    assert int(os.environ["PJRT_NPROC"]) >= 32
