"""What the demo shows in the end: a table for the terminal, and OUT/report.html."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jalign import report
from jalign.demo import task

SHOWN = 6  # prompts with their replies on the page
NOTE = (
    "A LLaMA of 0.8M parameters learns to answer, then what to prefer: replies that "
    "are about the person and the thing of the prompt and end well. Little more than "
    "half the demonstrations are such. PPO follows the trained reward model, DPO the "
    "same preference pairs, and each keeps its best checkpoint by held-out rows; the "
    "shares below come from none of these, but from the rule that made the data, on "
    "held-out prompts at temperature 1."
)
_BEFORE = {"SFT": "base", "PPO": "SFT", "DPO": "SFT"}
_RED = "\x1b[31m{}\x1b[0m"

Rows = Sequence[Mapping[str, Any]]


def worse(rows: Rows) -> list[str]:
    """The models that are preferred less often than what they were made from."""
    share = {row["model"]: row["preferred"] for row in rows}
    pairs = [pair for pair in _BEFORE.items() if share.keys() >= set(pair)]
    return [name for name, before in pairs if share[name] < share[before]]


def format_table(rows: Rows) -> str:
    """The rows as an aligned table; shares as percentages, in red what got worse."""
    cells = [list(rows[0])] + [list(as_text(row).values()) for row in rows]
    bad = worse(rows)
    for row in cells[1:]:
        row[0] += " (worse)" if row[0] in bad else ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *rest = zip(row, widths, strict=True)
        text = "  ".join([f"{first[0]:<{first[1]}}", *(f"{c:>{w}}" for c, w in rest)])
        red = row[0].endswith(" (worse)") and sys.stdout.isatty()
        return _RED.format(text) if red else text

    header, *body = map(line, cells)
    return "\n".join([header, "─" * len(header), *body])


def as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """The row's figures for a reader."""

    def text(name: str, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or "–"
        if name == "seconds":
            return f"{value:.0f}"
        return f"{value:.2f}" if name == "KL to SFT" else f"{value:.1%}"

    return {name: text(name, value) for name, value in row.items()}


def write_page(
    out: Path,
    rows: Rows,
    *,
    prompts: Sequence[str],
    replies: Mapping[str, Sequence[str]],
    folders: Mapping[str, str],
    kept: Mapping[str, int],
    seconds: Mapping[str, float],
    config: Mapping[str, Any],
) -> Path:
    """OUT/report.html of the whole demo.

    Args:
      out: the demo's folder.
      rows: of the table.
      prompts: held-out ones.
      replies: name of a model -> its replies to the prompts, in their order.
      folders: name of a stage -> its folder in `out`.
      kept: name of a stage -> the step that was kept.
      seconds: name -> what it took.
      config: to show.
    """
    table = [as_text(row) for row in rows]
    by_model = {row["model"]: row for row in table}
    bad = worse(rows)
    shown: list[dict[str, Any]] = [dict(row) for row in table]
    for row in shown:
        if row["model"] in bad:
            row["preferred"] = {"text": row["preferred"], "bad": True}
    return report.write_report(
        out,
        title="jalign demo: one small model, aligned twice",
        note=NOTE,
        summary={
            "preferred replies, SFT": by_model["SFT"]["preferred"],
            "with PPO": by_model["PPO"]["preferred"],
            "with DPO": by_model["DPO"]["preferred"],
            "reward model's accuracy": by_model["reward model"]["reward accuracy"],
            "seconds in all": f"{sum(seconds.values()):.0f}",
        },
        table=shown,
        samples=[
            {"prompt": prompt}
            | {name: _judged(prompt, texts[i]) for name, texts in replies.items()}
            for i, prompt in enumerate(prompts[:SHOWN])
        ],
        metrics_rows={
            name: report.read_metrics(out / folder / "metrics.jsonl")
            for name, folder in folders.items()
        },
        kept_step=kept,
        warnings=[
            f"{name} ended worse than {_BEFORE[name]}: preferred "
            f"{by_model[_BEFORE[name]]['preferred']} -> {by_model[name]['preferred']}"
            for name in bad
        ],
        timings=seconds,
        config=config,
    )


def _judged(prompt: str, reply: str) -> dict[str, Any]:
    return {"text": reply, "good": task.judge(prompt, reply).preferred}
