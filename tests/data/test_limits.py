"""Tests for jalign/data/templates.py: templates that never end, or fill the memory."""

import json
import resource
import shutil
import signal
import time

import pytest

from jalign import cli
from jalign.data import templates as limits
from jalign.data.rows import RowError
from jalign.data.templates import render
from jalign.demo import ASSETS
from tests.data.conftest import make_tokenizer, user

DOUBLING = (
    "{% set ns = namespace(s='x' * 1024) %}"
    "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
)
NESTED = (
    "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
)
HOSTILE = {
    "nested ranges": (NESTED, "did not finish within 0.3 s"),
    "a power": ("{{ (10 ** (10 ** 9)) % 7 }}", "0.3 s|more than 256 MiB"),
    "a product": ("{{ 'x' * 10 ** 9 }}", "more than 256 MiB"),
    "a huge product": ("{{ 'x' * 10 ** 12 }}", "more than 256 MiB"),
    "a product of a list": ("{{ ([0] * 10 ** 10) | length }}", "more than 256 MiB"),
    "doubling": (DOUBLING, "0.3 s|more than 256 MiB"),
    "padding": ("{{ '%*d' % (10 ** 9, 1) }}", "more than 256 MiB"),
    "a filter": ("{{ 'x' | center(10 ** 9) }}", "more than 256 MiB"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "refuses the row"),
    "a long text": ("{{ 'x' * 5000000 }}", "5000000 characters, more than 4194304"),
    "a long template": ("x" * 2**20 + "y", "1048577 characters, more than 1048576"),
}


@pytest.fixture
def tight(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "MEMORY", 256 << 20)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_with_a_message(tight, name):
    template, message = HOSTILE[name]
    tokenizer = make_tokenizer(chat_template=template)
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        render(tokenizer, [user("ab")], {})
    assert time.monotonic() - start < 5
    after = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    assert after == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "messages", "eos_token", "return_tensors"]
)
def test_a_row_brings_variables_and_no_template(name):
    tokenizer = make_tokenizer(chat_template="{{ x }}{{ tools[0] }}")
    assert render(tokenizer, [user("ab")], {"x": "X", "tools": [{}]}) == "X{}"
    with pytest.raises(RowError, match=f"chat_template_kwargs.*{name!r} is set by"):
        render(tokenizer, [user("ab")], {name: NESTED})


def test_the_command_ends_with_one_message(tight, tmp_path, capsys):
    shutil.copytree(ASSETS / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(settings | {"chat_template": NESTED}))
    rows = [{"messages": [user("a"), {"role": "assistant", "content": "b"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows * 9)))
    flags = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl"]
    flags += ["--out", tmp_path / "out", "--steps", 1]
    assert cli.main(["sft", *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert "chat template did not finish" in error and "Traceback" not in error


def test_somebody_elses_timer_goes_on(tight):
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert render(make_tokenizer(chat_template="a"), [user("ab")], {}) == "a"
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        time.sleep(0.3)
        assert rung
    finally:
        signal.signal(signal.SIGALRM, before)
