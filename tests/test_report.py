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
        "a<b": 1.0,
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
        table=[{"model": "SFT", "rate": 0.5}, {"model": "DPO", "rate": None}],
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
    assert "<b" not in "".join(re.findall(r"<span>a.*?</span>", page))


def test_everything_is_on_the_page(page):
    text = " ".join("".join(Page(page).text).split())
    for part in ("0.9375", "1,234,567", "1 min 23 s", "optim.b1", "0.9", "jaxlib"):
        assert part in text, part
    for part in ("not preferred", "nothing", "held-out", "chosen", "rejected", "DPO"):
        assert part in text, part


def test_related_curves_share_a_figure_and_nan_is_left_out():
    figures = {f.name: f for f in report.figures_of(ROWS)}
    assert set(figures) == {"loss", "rewards", "a<b"}  # grad_norm is never finite
    assert set(figures["loss"].curves) == {"train", "held-out"}
    assert set(figures["rewards"].curves) == {"chosen", "rejected"}
    assert figures["loss"].curves["held-out"] == ([40.0], [0.5])


def test_figures_follow_the_theme_and_are_deterministic():
    (first, *_), (again, *_) = report.figures_of(ROWS), report.figures_of(ROWS)
    assert first.svg == again.svg
    assert "var(--c1)" in first.svg and "var(--c2)" in first.svg
    assert not any(colour in first.svg for colour in report.CSS_VARIABLES)
    assert "font-family" not in first.svg


def test_every_metric_finds_a_group():
    names = ["loss/policy_avg", "learning_rate", "tokens_per_second", "whatever"]
    rows = [{"step": s} | dict.fromkeys(names, s) for s in range(3)]
    groups = {f.name: f.group for f in report.figures_of(rows)}
    assert list(groups.values()) == ["Loss", "Optimization", "Speed", "Other"]


def test_phases_have_their_own_sections(tmp_path):
    phases = {"Reward model": ROWS, "PPO": ROWS, "empty": []}
    text = report.write_report(
        tmp_path, title="t", config={}, metrics_rows=phases
    ).read_text("utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text)[:2] == ["Reward model", "PPO"]


def test_metrics_are_read_from_the_folder(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 1, "e": 3}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
    rows = report.read_metrics(file)
    assert rows == [{"step": 1, "loss": 2.0, "e": 3}, {"step": 2, "loss": 1.0}]
    assert ">loss<" in report.write_report(tmp_path, title="t").read_text("utf-8")
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


def test_smoothing_keeps_lines_and_marks_noise():
    line = [2.0 * i for i in range(50)]
    assert report.smooth(line) == pytest.approx(line)
    assert not report.is_noisy(line) and report.is_noisy([0.0, 1.0] * 20)
    assert len(report.thin(range(100_000))) <= report.MAX_POINTS


def test_importing_it_loads_neither_matplotlib_nor_jinja2():
    code = (
        "import sys, jalign.report;"
        "assert not {'matplotlib', 'jinja2', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
