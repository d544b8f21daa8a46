"""The comparison as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.settings import COLD_STEPS

WARM = (
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
COLD = (f"cold, s to step {COLD_STEPS}", "times jalign, cold")
HEADER = ("work", "framework", *WARM, *COLD)


def markdown(rows: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The table and, above it, what it was measured on."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = [facts, "", _line(HEADER), _line("---" for _ in HEADER)]
    return "\n".join(lines + [_line(_cells(row)) for row in rows]) + "\n"


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [row["work"], row["framework"], *_warm(row), *_cold(row)]


def _cold(row: Mapping[str, Any]) -> list[str]:
    if "cold_s" not in row:
        return [row.get("cold_missing", ""), ""]
    return [
        f"{row['cold_s']:.1f}",
        f"{row['cold_ratio']:.2f}" if "cold_ratio" in row else "",
    ]


def _warm(row: Mapping[str, Any]) -> list[str]:
    if "step_s" not in row:
        return [row.get("missing", "")] + [""] * (len(WARM) - 1)
    low, high = row["step_s_range"]
    return [
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
