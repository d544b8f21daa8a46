"""Two processes tokenize a data set by share: both have what one alone would have."""

import contextlib
import io
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from jalign import data
from jalign.data import examples
from jalign.train.inputs import examples_digest
from tests.data.conftest import CHATML, assistant, make_tokenizer, user
from tests.sharding import processes
from tests.train import world

COUNT = 13  # not a multiple of the processes, nor of the rows of a block
SHARE = 2  # rows that a process has of a block


def turns(i: int) -> list[dict[str, Any]]:
    system = [{"role": "system", "content": "be brief"}] * (i % 3 == 0)
    return [*system, user(f"ask {i} ü"), assistant("answer " * (i + 1)), user("a b")]


def sft_rows() -> list[dict[str, Any]]:
    """Conversations, prompts with answers, texts; some of them too long, or bad."""
    rows: list[dict[str, Any]] = []
    for i in range(COUNT):
        rows.append({"messages": turns(i)})
        rows.append({"prompt": "xa" * (i % 4), "completion": "bc" * 9 * i + "."})
        rows.append({"text": f"text {i}" if i % 5 else None})
    rows[3] = {"messages": [user("a"), assistant("b<|im_end|>")]}
    # The template writes no tools, which is found of the first of these conversations
    # only, and holds for both: the other one is in the other process's share.
    rows[12]["tools"], rows[15]["tools"] = [{"x": 1}], [{"name": "f"}]
    return rows


def pair_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(COUNT):
        chosen, rejected = ([assistant(f"{s} {i}" * 8)] for s in ("yes", "no"))
        rows.append({"prompt": turns(i), "chosen": chosen, "rejected": rejected})
        text = {"prompt": "xa", "chosen": f"b{i}", "rejected": f"cb{i % 7}"}
        rows.append(text | {"margin": i / 2})
    return rows


def prompt_rows() -> list[dict[str, Any]]:
    rows = [{"prompt": turns(i), "label": i} for i in range(COUNT)]
    return [*rows, {"prompt": "text"}, {"prompt": ""}]


CASES: dict[str, tuple[Any, list[dict], dict[str, Any]]] = {
    "sft": (data.sft_examples, sft_rows(), {"max_length": 100}),
    "dpo": (data.preference_examples, pair_rows(), {"max_length": 120}),
    "prompts": (data.prompt_examples, prompt_rows(), {"max_prompt_length": 90}),
    "fewer than processes": (data.sft_examples, sft_rows()[1:2], {"max_length": 100}),
}


def found(examples_of) -> dict[str, Any]:
    """What a data set becomes: examples, counts, what is logged, and refusals."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger("jalign.data").addHandler(handler)
    logging.getLogger("jalign.data").setLevel(logging.INFO)
    result: dict[str, Any] = {}
    for name, (make, given, how) in CASES.items():
        rows: Any = given
        rows = data.Rows(rows, [data.BadRow("here row 99", "(line)", "cut off")])
        merges = [("a", "b"), ("x", "a")]
        tokenizer = make_tokenizer(
            bos=False, eos="<|im_end|>", merges=merges, chat_template=CHATML
        )
        made, counts = examples_of(make, rows, tokenizer, bad_rows="skip", **how)
        result[name] = [len(made), examples_digest(made), counts]
        with pytest.raises(ValueError) as error:
            examples_of(make, rows, tokenizer, bad_rows="error", **how)
        result[f"{name} refused"] = str(error.value)
    logging.getLogger("jalign.data").removeHandler(handler)
    return result | {"said": heard.getvalue()}


def refusals(examples_of, read_rows, index: int) -> dict[str, str]:
    """What is said on this process where only one of them fails."""
    _, rows, how = CASES["sft"]
    large = (
        "{% if messages[0].content == 'b' %}{{ 'x' * 10 ** 12 }}{% endif %}" + CHATML
    )
    chats = [{"messages": [user(text), assistant("c")]} for text in "abab"]
    folder = Path(os.environ["JALIGN_TEST_ROWS"])

    def read():
        return read_rows(str(folder / ("missing.jsonl" if index else "rows.jsonl")))

    def make(rows, template=CHATML):
        tokenizer = make_tokenizer(chat_template=template)
        return examples_of(data.sft_examples, rows, tokenizer, bad_rows="skip", **how)

    def broken(name):
        def fail(*args):
            raise ValueError(f"{name} fails")

        with pytest.MonkeyPatch.context() as patch:
            if index:
                patch.setattr(examples, name, fail)
            make(rows)

    doing = {
        "before": lambda: broken("parse_by_columns"),
        "behind": lambda: broken("_finish"),
        "broken template": lambda: make(chats, large),
        "other rows": lambda: make(rows[index:]),
        "other template": lambda: make(rows, CHATML + "!" * index),
        "missing file": read,
    }
    texts = {}
    for name, do in doing.items():
        with pytest.raises((ValueError, OSError)) as error:
            do()
        texts[name] = f"{type(error.value).__name__}: {error.value}"
    return texts


WHERE_ONE_FAILS = {
    "before": (
        "ValueError: parse_by_columns fails",
        "OSError: tokenizing the rows: process 1 failed: ValueError: parse_by_columns",
    ),
    "behind": (
        "ValueError: _finish fails",
        "OSError: tokenizing the rows: process 1 failed: ValueError: _finish fails",
    ),
    "broken template": (
        "ValueError: the tokenizer's chat template needs more than 1024 MiB",
        "OSError: tokenizing the rows: process 1 failed: ValueError: the tokenizer's "
        "chat template needs more than 1024 MiB",
    ),
    "other rows": ("ValueError: the processes differ in .* the rows is",) * 2,
    "other template": ("ValueError: the processes differ in .* chat template is",) * 2,
    "missing file": (
        "FileNotFoundError: .*missing.jsonl: there is no such file",
        "OSError: reading the rows: process 1 failed: FileNotFoundError: .*missing",
    ),
}
"""What process 1 says, and what process 0 says."""


def command(folder: Path) -> list[Any]:
    """The exit code of a run with a bad row, and its last line."""
    bad = folder / "bad.jsonl"
    given = "--data", str(bad), "--mesh", "fsdp=2"
    with contextlib.redirect_stderr(io.StringIO()) as heard:
        code = world.run("sft", folder, folder / "out", *given)
    return [code, heard.getvalue().splitlines()[-1]]


def _both():
    import os
    from pathlib import Path

    import jax

    from jalign.sharding import agreement
    from jalign.train import rows
    from tests import test_two_processes_rows as here

    rows._SHARE, agreement.PIECE_BYTES = here.SHARE, 4096
    sent = [bytes(range(250)) * 40 * (1 - p) for p in range(2)]
    parts = agreement.gather_bytes(sent[jax.process_index()])
    assert [part.tobytes() for part in parts] == sent
    given = rows.examples_of, rows.read_rows, jax.process_index()
    folder = Path(os.environ["JALIGN_TEST_ROWS"])
    return [here.found(rows.examples_of), here.refusals(*given), here.command(folder)]


def test_two_processes_have_the_examples_of_one(tmp_path, monkeypatch):
    world.make(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()
    lines[5] = json.dumps({"prompt": "a b", "completion": "c </s> d"})
    (tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setenv("JALIGN_TEST_ROWS", str(tmp_path))
    first, second = processes.run(_both, devices=1)
    alone = found(lambda make, *given, **how: make(*given, **how))
    alone = json.loads(json.dumps(alone))
    assert "texts merge tokens" in alone["said"]
    for name, value in alone.items():
        assert value == first[0][name] == second[0][name], name
    for name, (ended, other) in WHERE_ONE_FAILS.items():
        said = first[1][name], second[1][name]
        assert re.match(ended, said[1]) and re.match(other, said[0]), (name, said)
    code, text = first[2]
    assert [code, text] == second[2]
    assert code == 2 and f"{tmp_path / 'bad.jsonl'} row 6, field 'completion'" in text


def test_every_command_tokenizes_by_share():
    """A call of an example maker, not of `examples_of` with it, would not."""
    room = Path(data.__file__).parents[1]
    calls = re.compile(r"data\.(sft|preference|prompt)_examples\(|data\.load_rows\(")
    for file in [room / "commands.py", *sorted((room / "train").glob("*.py"))]:
        found = calls.findall(file.read_text(encoding="utf-8"))
        assert len(found) == (file.name == "rows.py"), file  # read_rows itself
