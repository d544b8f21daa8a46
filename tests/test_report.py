"""Tests for jalign/report.py."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from jalign import report

ROWS = [
    {
        "step": step,
        "loss": 1 / step,
        "grad_norm": float("nan"),
        "rewards/chosen": step,
        "rewards/rejected": -step,
        "a<b": step**2,
        "beta": 0.1,
    }
    for step in range(1, 41)
] + [{"step": 40, "eval_loss": 0.5}]


class Page(HTMLParser):
    """Collects tags, the text, and every attribute that could load something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href", "xlink:href"}]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = report.write_report(
        tmp_path_factory.mktemp("run") / "new",
        title="A <title>",
        config={"model": "m", "optim": {"b1": 0.9}, "eval_data": None},
        metrics_rows=ROWS,
        samples=[
            {"prompt": "<script>x</script>", "before": "b & c", "after": ""},
            {"prompt": "p", "before": {"text": "no", "good": False}, "after": "yes"},
        ],
        summary={"accuracy": 0.93751, "tokens": 1_234_567},
        timings={"train": 83.0, "load": 0.5},
        table=[
            {"model": "SFT", "rate": 0.5},
            {"model": "DPO", "rate": {"text": "9.9%", "bad": True}},
        ],
        evaluations=[{"step": 0, "eval_loss": 0.75}, {"step": 40, "eval_loss": 0.25}],
        kept_step=0,
        warnings=["worse <than> before"],
    )
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_self_contained_and_runs_no_script(page):
    parsed = Page(page)
    assert "script" not in parsed.tags and "link" not in parsed.tags
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.findall(r"url\((?!#)|@import|xlink:href=\"(?!#)", page)


def test_text_from_models_is_escaped(page):
    assert "<script>x" not in page and "&lt;script&gt;x&lt;/script&gt;" in page
    assert "A &lt;title&gt;" in page and "b &amp; c" in page
    assert "<b>a&lt;b</b>" in page and "worse &lt;than&gt; before" in page


def test_everything_is_on_the_page(page):
    text = " ".join("".join(Page(page).text).split())
    for part in ("0.9375", "1,234,567", "1 min 23 s", "optim.b1", "0.9", "jaxlib"):
        assert part in text, part
    for part in ("not preferred", "nothing", "held-out", "chosen", "rejected", "DPO"):
        assert part in text, part


def test_held_out_measurements_the_kept_step_and_warnings_are_shown(page):
    # One point a step: the evaluation's 0.25 and not the row's 0.5.
    assert re.search(r"<b>loss</b><data>0.025 · 0.25</data>", page)
    assert "<b>0</b><span>kept_<wbr>step</span>" in page and "kept: 0<" in page
    assert '<ul class="warnings"' in page and '<td class="bad">9.9%</td>' in page
    assert "Did not change: beta 0.1." in page
    assert "What the optimizer minimizes" in page


def test_phases_have_their_own_sections_and_links_to_them(tmp_path):
    phases = {"Reward model": ROWS[:3], "PPO": ROWS[:3], "empty": []}
    text = report.write_report(
        tmp_path,
        title="t",
        config={},
        metrics_rows=phases,
        evaluations={"PPO": [{"step": 2, "eval_loss": 0.125}]},
        kept_step={"PPO": 2},
        table=[{"model": "base", "x": 1}, {"model": "PPO", "x": 2}],
    ).read_text("utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:3] == ["Comparison", "Reward model", "PPO"]
    anchor = re.search(r'<a href="#(.*?)">PPO</a>', text).group(1)
    section = text.partition(f'<section id="{anchor}">')[2]
    assert "<h2>PPO</h2>" in section and "held-out" in section
    assert "Reward model" not in section and ">base</a>" not in text
    assert "<b>2</b><span>kept_<wbr>step, PPO</span>" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"evaluations": {"PPO": []}}, "evaluations: no phase 'PPO' .* \\('SFT'\\)"),
        ({"kept_step": {"PPO": 3}}, "kept_step: no phase 'PPO'"),
        ({"kept_step": 0}, "give kept_step as phase -> value"),
        ({"metrics_rows": ROWS, "kept_step": {"SFT": 3}}, "kept_step is by phase"),
    ],
)
def test_what_is_not_of_a_phase_is_refused(tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        report.write_report(tmp_path, title="t", **{"metrics_rows": {"SFT": []}} | more)


def test_rows_of_a_step_are_one_row_in_the_order_of_the_steps():
    rows = [{"step": 2, "a": 1}, {"b": 5}, {"step": 0, "a": 3}, {"step": 2, "a": 4}]
    assert report.by_step(rows) == [{"step": 0, "a": 3}, {"step": 2, "a": 4}, {"b": 5}]


def test_metrics_are_read_from_the_folder(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 1, "e": 3}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    rows = report.read_metrics(file)
    assert rows == [{"step": 1, "loss": 2.0, "e": 3}, {"step": 2, "loss": 1.0}]
    assert "<b>loss</b>" in report.write_report(tmp_path, title="t").read_text("utf-8")
    file.write_text('{"step": 1}\nbroken\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        report.read_metrics(file)
    assert report.read_metrics(tmp_path / "none.jsonl") == []


def test_an_empty_run_still_gives_a_page(tmp_path):
    text = report.write_report(tmp_path, title="nothing yet").read_text("utf-8")
    assert "Environment" in text and "Curves" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "True"),
        (3, "3"),
        (0.123456, "0.1235"),
        (13653.2, "13,653"),
        (float("nan"), "nan"),
        ((1, "a"), "1, a"),
        ("x", "x"),
    ],
)
def test_values_are_short(value, text):
    assert report.format_value(value) == text


def test_importing_it_loads_neither_matplotlib_nor_jinja2():
    code = (
        "import sys, jalign.report;"
        "assert not {'matplotlib', 'jinja2', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
