"""Rows, splits and columns as the commands read them, from files to an exit code."""

import json
import logging

import pytest

from jalign import cli
from jalign.train import offline, online
from tests.train.ppo_world import write_world

QA = [{"question": "a b", "answer": "c d", "id": i} for i in range(4)]
PAIR = {"question": "a b", "response_j": "c d", "response_k": "e f"}
STOPPED = 75  # by the fixture `only_rows`
SHORT = ["--batch-size", "4", "--max-length", "48", "--mesh", "fsdp=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, and two data sets with splits, broken lines and other files."""
    folder = tmp_path_factory.mktemp("rows")
    write_world(folder)
    for name, rows in (("qa", QA), ("pairs", [PAIR] * 4)):
        data = folder / name
        (data / "train").mkdir(parents=True)
        (data / "test").mkdir()
        lines = [json.dumps(row) + "\n" for row in rows]
        (data / "train" / "0.jsonl").write_text("".join(lines) + '{"cut\n')
        header = ",".join(rows[0])
        line = ",".join(str(value) for value in rows[0].values())
        (data / "test" / "0.csv").write_text(f"{header}\n{line}\ntoo,many,,fields,x\n")
        (data / "notes.txt").write_text("not rows")
    return folder


@pytest.fixture
def jalign(world, monkeypatch, caplog):
    """Runs a command in this process: (arguments) -> (exit code, what was logged)."""
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)

    def run(command, *words):
        caplog.clear()
        with caplog.at_level(logging.INFO, "jalign"):
            code = cli.main(
                [command, "--model", str(world / "model"), *map(str, words)]
            )
        return code, caplog.text

    return run


@pytest.fixture
def only_rows(monkeypatch):
    """Ends a training command where it would compute, its rows read and encoded."""

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    for module, name in (
        (offline, "measure"),
        (offline, "reference_examples"),
        (online, "make_functions"),
    ):
        monkeypatch.setattr(module, name, stop)


TRAINING = ["sft", "reward", "dpo", "ppo", "grpo"]


def training_words(command, world, out, *words, data=None):
    data = data or world / ("pairs" if command in {"reward", "dpo"} else "qa")
    words = ["--data", data, "--out", out, *SHORT, *words]
    if command in {"ppo", "grpo"}:
        reward = ["--reward", f"{world / 'reward.py'}:share_of_a"]
        words += [*reward, "--max-new-tokens", "8"]
    return [command, *words]


@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize("how", ["split", "data"])
def test_a_folder_with_splits_and_broken_lines_is_read(
    command, how, world, jalign, only_rows, tmp_path
):
    folder = world / ("pairs" if command in {"reward", "dpo"} else "qa")
    held_out = {"split": ["--eval-split", "test"], "data": ["--eval-data", folder]}
    words = training_words(command, world, tmp_path, *held_out[how])
    code, log = jalign(*words, "--bad-rows", "skip")
    assert code == STOPPED
    assert f"{folder}: split 'train', 4 rows" in log
    assert f"{folder}: split 'test', 1 rows" in log
    assert log.count("not read: notes.txt") == 2  # of each of the two readings
    assert "examples 4, bad_rows 1, bad_rows/(line): broken JSON at column N" in log
    assert "examples 1, bad_rows 1, bad_rows/(line): has N fields" in log
    assert log.count("rows are unusable and left out") == 2  # more than a tenth
    assert log.count("columns read: question") == 2
    unread = {"sft": "id", "ppo": "answer, id", "grpo": "answer, id"}
    assert log.count(f"; not read: {unread.get(command, 'none')}\n") == 2
    # Without the option, the broken line is an error.
    assert jalign(*words)[0] == cli.EXIT_USER


@pytest.mark.parametrize("command", TRAINING)
def test_what_would_be_passed_over_is_refused_by_every_command(
    command, world, jalign, only_rows, tmp_path, capsys
):
    answers = PAIR if command in {"reward", "dpo"} else QA[0]
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    turns = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"}]
    called = {**answers, "question": None, "prompt": turns}
    source = tmp_path / "rows.jsonl"
    for row, words in (
        ({**answers, "input": "g h"}, "'input': is not read beside question"),
        ({**answers, "tools": [{"name": "f"}]}, "'tools': the chat template writes n"),
        (called, "the default chat template knows no tool calls"),
    ):
        source.write_text(json.dumps(row) + "\n")
        words_of = training_words(command, world, tmp_path / "o", data=source)
        assert jalign(*words_of)[0] == cli.EXIT_USER
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_held_out_rows_that_are_trained_on_are_warned_of(
    command, world, jalign, only_rows, tmp_path
):
    rows = world / "qa" / "train" / "0.jsonl"
    words = training_words(command, world, tmp_path, "--eval-data", rows, data=rows)
    code, log = jalign(*words, "--bad-rows", "skip")
    assert code == STOPPED
    assert f"4 of 4 held-out rows are training rows ({rows} row 1 ...)" in log


def test_eval_holds_out_and_never_takes_train(world, jalign, capsys, tmp_path):
    how = ["--bad-rows", "skip", *SHORT]
    code, log = jalign("eval", "--data", world / "qa", *how)
    assert code == 0 and f"{world / 'qa'}: split 'test', 1 rows" in log
    assert json.loads(capsys.readouterr().out)["rows"]["examples"] == 1
    (tmp_path / "train.jsonl").write_text(json.dumps(QA[0]) + "\n")
    (tmp_path / "train2.jsonl").write_text(json.dumps(QA[0]) + "\n")
    code, _ = jalign("eval", "--data", tmp_path, *how)
    message = capsys.readouterr().err
    assert code == cli.EXIT_USER
    assert (
        "no file for split 'test' or 'validation'" in message and "--split" in message
    )
    code, log = jalign("eval", "--data", tmp_path, "--split", "train", *how)
    assert code == 0 and "split 'train', 2 rows" in log


def test_generate_takes_a_split_and_columns_and_writes_the_prompt(
    world, jalign, tmp_path
):
    out = tmp_path / "rows.jsonl"
    words = ("--prompts", world / "qa", "--split", "test", "--bad-rows", "skip")
    how = ("--max-new-tokens", "2", "--mesh", "fsdp=1", "--out", out)
    assert jalign("generate", *words, *how)[0] == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["prompt"] == [{"role": "user", "content": "a b"}]
    assert jalign("generate", *words, "--columns", "prompt=question", *how)[0] == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["prompt"] == "a b"


@pytest.mark.parametrize("command", ["sft", "ppo"])
@pytest.mark.parametrize(
    "words, message",
    [
        (["--columns", "prompt=questoin"], "no row has 'questoin'; did you mean 'ques"),
        (["--columns", "promt=question"], "nothing reads 'promt'; did you mean 'promp"),
        (["--split", "dev"], "no file for split 'dev'"),
        (["--eval-split", "dpo"], "no file for split 'dpo'"),
        (["--max-length", "LOW"], "4 of the 4 usable rows do not fit: with max_"),
    ],
)
def test_what_cannot_be_is_one_message_and_exit_2(
    command, words, message, world, jalign, only_rows, capsys, tmp_path
):
    low = {"LOW": {"sft": "4", "ppo": "10"}[command]}  # ppo's holds 8 new tokens
    words = ["--bad-rows", "skip", *(low.get(word, word) for word in words)]
    code, _ = jalign(*training_words(command, world, tmp_path, *words))
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == cli.EXIT_USER and message in error and "Traceback" not in error
