"""Tests for jalign/cli.py: parsing, YAML, exit codes and messages."""

import dataclasses

import pytest

from jalign import cli


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str
    steps: int | None = None
    resume: bool = True
    optim: Inner = dataclasses.field(default_factory=Inner)


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
    want = Config("a", 9, False, Inner(1e-5, (0.5, 0.6)))
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
    assert words in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


def test_a_library_error_is_a_bug_with_its_traceback(command, monkeypatch, capsys):
    def run(name, args):
        raise ValueError("from a library")  # raised outside the package

    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["probe"]) == cli.EXIT_BUG
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in cli.COMMANDS if n != "demo"])
def test_help_is_complete(name, capsys):
    """Every option has a line in --help, and no default is an unset marker."""
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    module, config, *_ = cli.COMMANDS[name]
    fields = cli.flags_of(getattr(__import__(module, fromlist=["x"]), config))
    for field in fields:
        assert f"--{field.replace('_', '-')}" in text
