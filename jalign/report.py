"""OUT/report.html: one self-contained page about a run, readable without a network.

Figures are inline SVG whose colours are CSS variables, so that one figure serves both
themes. The page holds no script, and the template escapes text from models and data.
"""

import io
import json
import math
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["environment", "read_metrics", "write_report"]

Rows = Sequence[Mapping[str, Any]]
Curve = tuple[list[float], list[float]]

# Groups of figures, in the order they are shown; a metric goes to the first match.
GROUPS = (
    ("Loss", r"(eval_)?loss(/.*)?|nll_loss|.*/loss"),
    ("Rewards and objective", r"(eval_)?(rewards?|objective|scores?)(/.*|_.*)?"),
    ("Accuracy", r".*(accurac(y|ies)|margin|entropy).*"),
    ("Policy and value", r"(eval_)?(policy|val|value|kl|logps|completions)([/_].*)?"),
    ("Optimization", r"learning_rate|lr|grad_norm|beta|kl_coef|skipped.*"),
    ("Speed", r".*(time|per_second|mfu|num_tokens|seconds|memory).*"),
    ("Other", r".*"),
)
# Not figures: where a row stands, not what was measured there.
AXES = {"step", "epoch", "time", "phase"}
# Colours matplotlib is told to use -> the CSS variables put in their place.
INK, GRID, SERIES = "#0a0b01", "#0a0b02", ("#0a0b11", "#0a0b12", "#0a0b13", "#0a0b14")
CSS_VARIABLES = {INK: "var(--soft)", GRID: "var(--line)"} | {
    colour: f"var(--c{i + 1})" for i, colour in enumerate(SERIES)
}
MAX_POINTS = 400
RC: Any = {"svg.fonttype": "none", "font.size": 8}


class Figure(NamedTuple):
    """A figure of the page: its name, lines by label, group, and finished SVG."""

    name: str
    curves: dict[str, Curve]
    group: str = ""
    svg: str = ""


def write_report(
    out_dir: str | Path,
    *,
    title: str,
    config: Mapping[str, Any] | None = None,
    metrics_rows: Rows | Mapping[str, Rows] | None = None,
    samples: Rows = (),
    summary: Mapping[str, Any] | None = None,
    timings: Mapping[str, float] | None = None,
    table: Rows = (),
    note: str = "",
    evaluations: Rows = (),
    kept_step: int | None = None,
    warnings: Sequence[str] = (),
) -> Path:
    """Writes OUT/report.html, which refers to no other file, and returns its path.

    Args:
      out_dir: the run's folder; made if it is missing.
      title: the heading, for example "DPO on alpaca_eval".
      config: every setting of the run; nested mappings become dotted names.
      metrics_rows: rows of metrics, each with a "step"; or phase name -> rows for a
        run of several phases; None reads OUT/metrics.jsonl.
      samples: dicts with a "prompt" and one text for each model, shown side by side
        in the order of the keys, for example prompt, before, after. In place of a
        text stands {"text": str, "good": bool} where a judge has spoken.
      summary: headline figures, shown large; numbers or short texts.
      timings: name -> seconds.
      table: rows of a comparison, all with the same keys, for example one a model.
      note: a sentence or two under the heading.

    Raises: ValueError if metrics.jsonl holds a line that is not JSON.
    """
    import jinja2

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    if metrics_rows is None:
        metrics_rows = read_metrics(out / "metrics.jsonl")
    phases = metrics_rows if isinstance(metrics_rows, Mapping) else {"": metrics_rows}
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": format_value, "duration": format_seconds}
    text = page.from_string(source).render(
        title=title,
        note=note,
        summary=summary or {},
        table=[dict(row) for row in table],
        phases=[(name, figures_of(rows)) for name, rows in phases.items()],
        samples=samples,
        config=flatten(config or {}),
        timings=timings or {},
        environment=environment(),
    )
    path = out / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file, one a step; none if there is no file.

    Where a resumed run wrote a step again, the later row counts. A last line cut off
    by a kill is left out; any other broken line raises ValueError.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows: dict[Any, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        # Evaluation rows share a step with training rows: merge, do not replace.
        key = row.get("step", ("row", number))
        rows[key] = rows.get(key, {}) | row
    return list(rows.values())


def environment() -> dict[str, str]:
    """Name -> version or devices, as shown in the report; starts the jax backend."""
    import jax

    kinds = Counter(device.device_kind for device in jax.devices())
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": ", ".join(f"{n} x {kind}" for kind, n in kinds.items()),
        "processes": str(jax.process_count()),
    }
    for name in ("jalign", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"b1": 0.9}} -> {"optim.b1": 0.9}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def figures_of(rows: Rows) -> list[Figure]:
    """Every metric of the rows as figures, in the order of GROUPS."""
    names, found = [name for name, _ in GROUPS], []
    for figure in merge_related(curves_of(rows)):
        group = next(g for g, rule in GROUPS if re.fullmatch(rule, figure.name))
        found.append(figure._replace(group=group, svg=draw(figure)))
    return sorted(found, key=lambda figure: names.index(figure.group))


def curves_of(rows: Rows) -> dict[str, Curve]:
    """Metric name -> (steps, values), without the values that are not finite."""
    curves: dict[str, Curve] = {}
    for index, row in enumerate(rows):
        for name, value in row.items():
            if name in AXES or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row.get("step", index)))
                values.append(float(value))
    return curves


def merge_related(curves: Mapping[str, Curve]) -> list[Figure]:
    """`eval_x` joins the figure `x`; `x/chosen` and `x/rejected` share `x`, too."""
    figures: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        base = name.removeprefix("eval_")
        head, _, tail = base.rpartition("/")
        if tail in {"chosen", "rejected"}:
            label = tail if base == name else f"held-out {tail}"
            figures.setdefault(head, {})[label] = curve
        elif base != name and base in curves:
            figures.setdefault(base, {})["held-out"] = curve
        else:
            label = "train" if f"eval_{name}" in curves else name
            figures.setdefault(name, {})[label] = curve
    return [Figure(name, lines) for name, lines in figures.items()]


def thin(values: Sequence[float]) -> list[float]:
    """Means of neighbours, at most MAX_POINTS of them."""
    width = -(-len(values) // MAX_POINTS)
    parts = (values[i : i + width] for i in range(0, len(values), width))
    return [sum(part) / len(part) for part in parts]


def is_noisy(values: Sequence[float]) -> bool:
    """True where a curve goes up and down far more than it goes anywhere."""
    path = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    return len(values) >= 30 and path > 3 * (max(values) - min(values))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over a tenth of the curve; its window shrinks evenly
    towards the ends, so that a straight line stays itself and nothing lags."""
    half, last = max(2, len(values) // 20), len(values) - 1
    reach = [min(half, i, last - i) for i in range(len(values))]
    return [sum(values[i - r : i + r + 1]) / (2 * r + 1) for i, r in enumerate(reach)]


def draw(figure: Figure) -> Any:
    """The figure's lines as an SVG element, escaped where it holds names."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(RC | {"svg.hashsalt": figure.name}):
        canvas = Canvas(figsize=(3.5, 1.9), layout="constrained")
        axes = style(canvas.add_subplot())
        for (label, curve), colour in zip(figure.curves.items(), SERIES, strict=False):
            plot(axes, label, curve, colour)
        if len(figure.curves) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=7, handlelength=1.2)
        return Markup(svg_of(canvas))


def plot(axes: Any, label: str, curve: Curve, colour: str) -> None:
    """One line; a noisy one is drawn faint with its moving average on top."""
    steps, values = thin(curve[0]), thin(curve[1])
    dot = "." if len(values) == 1 else ""
    if is_noisy(values):
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
        values = smooth(values)
    axes.plot(steps, values, color=colour, linewidth=1.6, label=label, marker=dot)


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


def format_value(value: Any) -> str:
    """Numbers to 4 digits, lists joined, None as a dash; anything else as text."""
    if value is None:
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, list | tuple):
        return ", ".join(format_value(v) for v in value)
    if not hasattr(value, "__float__"):
        return str(value)
    number = float(value)
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e12 else f"{number:.4g}"


def format_seconds(seconds: float) -> str:
    """0.12 -> "0.12 s", 83 -> "1 min 23 s", 7260 -> "2 h 1 min"."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
