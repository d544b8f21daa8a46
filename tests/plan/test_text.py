"""A plan as a table, as JSON, and as a page."""

import json
import re
from html.parser import HTMLParser

import pytest

from jalign import cli, plan
from jalign.plan.text import accounts

from .test_estimate import LARGE, ON_16


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_a_table_fits_a_terminal(recipe):
    settings = ON_16 | {"mesh": "data=2,fsdp=4,tensor=2"}
    text = str(plan.plan(recipe, LARGE, **settings, lora_rank=8))
    assert max(map(len, text.splitlines())) <= 80
    assert "- MaxText's 32B on 256 chips: it was off by" in text


def test_a_search_fits_a_terminal():
    how = dict(topology="v5e:16x16", find="fastest", batch_size=256, max_length=512)
    found = plan.plan("sft", LARGE, **how, allow="optimizer,dtype")
    assert max(map(len, str(found).splitlines())) <= 80
    assert "jalign sft --model" in str(found) and len(found.found) == 5


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & dict(attrs).keys()
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += filter(None, [data.strip()])


def test_json_and_page_hold_what_the_table_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)
    data, page = tmp_path / "plan.json", tmp_path / "plan.html"
    words = "plan dpo --model llama-3.1-8b --topology v5e --find smallest".split()
    words += ["--dtype", "bfloat16", "--batch-size", "64", "--beta", "0.3"]
    assert cli.main([*words, "--json", str(data), "--html", str(page)]) == 0
    table = capsys.readouterr().out
    told = json.loads(data.read_text("utf-8"))
    assert told["fits"] and told["mesh"]["fsdp"] == told["machine"]["num_devices"]
    assert told["config"]["dpo"]["beta"] == 0.3
    seconds = told["speed"]["seconds"]
    assert re.search(rf"in all +{seconds:.3f}  MFU", table)
    assert told["compiled_speed"] is None and told["command"].startswith("jalign dpo")
    assert seconds <= told["next_best"][0]["speed"]["seconds"]
    parsed = Page(page.read_text("utf-8"))
    assert "script" not in parsed.tags and told["command"] in parsed.text
    for line in table.splitlines():
        if number := re.match(r"  (\S.*?) +(\d+\.\d{3})\b", line):
            assert set(number.groups()) <= set(parsed.text), line
    assert cli.main([*words, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == told


def test_a_page_says_first_that_it_does_not_fit(tmp_path):
    config = plan.SFTPlan(
        model="llama-3.1-8b", topology="v5e:1x1", html=str(tmp_path / "plan.html")
    )
    text = plan.run_plan(config)
    page = (tmp_path / "plan.html").read_text("utf-8")
    assert "does NOT fit" in text and 'role="alert"' in page
    assert page.index("does NOT fit in 16 GiB") < page.index('tiles"')


def test_accounts_have_their_units():
    found = plan.plan("ppo", LARGE, **ON_16)
    assert [account.unit for account in accounts(found)] == ["GiB", "TFLOP", "GB", "s"]
    assert all("update" in account.title for account in [*accounts(found)][1:])
