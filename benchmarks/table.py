"""The comparison as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADER = (
    "work",
    "framework",
    "step, s (range)",
    "CPU s",
    "times jalign",
    "times jalign, CPU",
    "useful tokens/s",
    "examples/s",
    "first step, s",
    "peak MiB (after imports)",
    "loss gap",
    "of floor",
)


def markdown(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The table and, above it, what it was measured on."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [facts, "", _line(HEADER), _line("---" for _ in HEADER)]
    return "\n".join(lines + [_line(_cells(row)) for row in rows]) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    head = [row["work"], row["framework"]]
    if "missing" in row:
        return head + [row["missing"]] + [""] * (len(HEADER) - 3)
    low, high = row["step_s_range"]
    return head + [
        f"{row['step_s']:.3f} ({low:.3f} to {high:.3f})",
        "" if row["cpu_s"] is None else f"{row['cpu_s']:.2f}",
        f"{row['ratio']:.2f}" if "ratio" in row else "",
        f"{row['cpu_ratio']:.2f}" if row.get("cpu_ratio") else "",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['examples_per_s']:.2f}",
        f"{row['first_step_s']:.1f}",
        f"{row['rss_peak']:,.0f} ({row['rss_imported']:,.0f})",
        "" if row.get("loss_gap") is None else f"{row['loss_gap']:.0e}",
        f"{row['floor']:.0%}" if "floor" in row else "",
    ]
