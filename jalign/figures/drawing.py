"""From the lines of a figure to inline SVG.

Colours are CSS variables, so that one figure serves both themes.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Curve = tuple[list[float], list[float]]
"""Positions and values of the same length, in the order of the steps."""

OVER_KL = "reward over KL"
# Colours matplotlib is told to use -> the CSS variables put in their place.
INK, GRID, SERIES = "#0a0b01", "#0a0b02", ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14")
CSS_VARIABLES = {INK: "var(--soft)", GRID: "var(--line)"} | {
    colour: f"var(--c{i + 1})" for i, colour in enumerate(SERIES)
}
MAX_POINTS = 400
FEW_POINTS = 30  # so few are shown one by one
RC: Any = {"svg.fonttype": "none", "font.size": 8}


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
      name: of the metric; OVER_KL for the one whose horizontal axis is the KL.
      curves: lines by label.
      group, note: where it is shown, and how to read it.
      svg: the finished drawing.
      kept: the points of the step whose weights were kept, in the one over KL.
    """

    name: str
    curves: dict[str, Curve]
    group: str = ""
    note: str = ""
    svg: str = ""
    kept: Curve = ([], [])


def draw(figure: Figure, kept_step: int | None) -> Any:
    """The figure's lines as an SVG element, escaped where it holds names."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure as Canvas

    over_kl = figure.name == OVER_KL
    with matplotlib.rc_context(RC | {"svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=(4.6, 2.6) if over_kl else (3.5, 1.9))
        canvas.set_layout_engine("constrained")
        axes = style(canvas.add_subplot())
        for (label, curve), colour in zip(figure.curves.items(), SERIES, strict=False):
            (plot_over_kl if over_kl else plot)(axes, label, curve, colour)
        if over_kl:
            axes.set_xlabel("KL to the reference, nats a completion", color=INK)
        if kept_step is not None:
            mark_kept(axes, figure, kept_step)
        if len(figure.curves) > 1 or over_kl:
            axes.legend(frameon=False, labelcolor=INK, fontsize=7, handlelength=1.2)
        return Markup(svg_of(canvas))


def plot(axes: Any, label: str, curve: Curve, colour: str) -> None:
    """One line; a noisy one is drawn faint with its moving average on top, and one of
    a few held-out measurements with its points."""
    steps, values = thin(curve[0]), thin(curve[1])
    few = len(values) == 1 or (label != "train" and len(values) <= FEW_POINTS)
    if is_noisy(values):
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
        values = smooth(values)
    how = {"marker": "o" if few else "", "markersize": 2.6}
    axes.plot(steps, values, color=colour, linewidth=1.6, label=label, **how)


def plot_over_kl(axes: Any, label: str, curve: Curve, colour: str) -> None:
    """Points, and a line through them in the order of the steps: through their moving
    average where they are many."""
    kl, values = thin(curve[0]), thin(curve[1])
    many = len(values) >= FEW_POINTS
    how = {"alpha": 0.3 if many else 1.0, "markersize": 2.6, "linewidth": 0}
    axes.plot(kl, values, color=colour, marker="o", **how)
    if many:
        kl, values = smooth(kl), smooth(values)
    axes.plot(kl, values, color=colour, linewidth=1.6, label=label)


def mark_kept(axes: Any, figure: Figure, kept_step: int) -> None:
    """Shows which step OUT/model is of, in a figure with held-out measurements."""
    if figure.name == OVER_KL:
        if figure.kept[0]:
            ring = {"marker": "o", "markersize": 8, "markerfacecolor": "none"}
            label = f"kept: step {kept_step}"
            axes.plot(*figure.kept, color=INK, linewidth=0, label=label, **ring)
    elif any(label.startswith("held-out") for label in figure.curves):
        axes.axvline(kept_step, color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        where = {"xy": (kept_step, 1.0), "xycoords": ("data", "axes fraction")}
        look = {"ha": "center", "va": "bottom", "fontsize": 7, "color": INK}
        axes.annotate(f"kept: {kept_step}", **where, **look)


def thin(values: Sequence[float]) -> list[float]:
    """Means of neighbours, at most MAX_POINTS of them."""
    width = -(-len(values) // MAX_POINTS)
    parts = (values[i : i + width] for i in range(0, len(values), width))
    return [sum(part) / len(part) for part in parts]


def is_noisy(values: Sequence[float]) -> bool:
    """True where a curve goes up and down far more than it goes anywhere."""
    path = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    return len(values) >= FEW_POINTS and path > 3 * (max(values) - min(values))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over a tenth of the curve; its window shrinks evenly
    towards the ends, so that a straight line stays itself and nothing lags."""
    half, last = max(2, len(values) // 20), len(values) - 1
    reach = [min(half, i, last - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def style(axes: Any) -> Any:
    """Quiet axes: horizontal grid lines, few ticks, no frame."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.tick_params(length=0, colors=INK)
    axes.locator_params(axis="both", nbins=5)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_color(INK)
    axes.patch.set_visible(False)
    return axes


def svg_of(canvas: Any) -> str:
    """SVG text that takes its width, font and colours from the page around it."""
    buffer = io.StringIO()
    canvas.patch.set_visible(False)
    canvas.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue().partition("<svg")[2]
    text = re.sub(r"(?s)<metadata>.*?</metadata>", "", text)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    for colour, variable in CSS_VARIABLES.items():
        text = text.replace(colour, variable)
    return "<svg" + text
