"""OUT/report.html: one self-contained page about a run, readable without a network.

The page holds no script, and the template escapes text from models and data.
"""

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from jalign.figures import OVER_KL, Figures, figures_of
from jalign.paths import located, make_folder, write_text

__all__ = ["environment", "read_metrics", "write_report"]

Rows = Sequence[Mapping[str, Any]]


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
    evaluations: Rows | Mapping[str, Rows] = (),
    kept_step: int | Mapping[str, int] | None = None,
    warnings: Sequence[str] = (),
) -> Path:
    """Writes OUT/report.html, which refers to no other file, and returns its path.

    Args:
      out_dir: the run's folder; made if it is missing.
      title: the heading, for example "DPO on alpaca_eval".
      config: every setting of the run; nested mappings become dotted names.
      metrics_rows: rows of metrics, each with a "step"; or phase name -> rows for a
        run of several phases; None reads OUT/metrics.jsonl.
      evaluations: rows of held-out measurements before (step 0), during and after
        training, {"step": int, "eval_NAME": float, ...}; eval_NAME joins the figure of
        NAME. They win over eval_ columns that metrics_rows have at the same step. With
        phases, phase name -> rows.
      kept_step: the step whose weights are OUT/model, marked in the figures with
        held-out measurements. With phases, phase name -> step.
      warnings: sentences shown in red under the heading.
      samples: dicts with a "prompt" and one text for each model, shown side by side
        in the order of the keys, for example prompt, before, after. In place of a
        text stands {"text": str, "good": bool} where a judge has spoken.
      summary: headline figures, shown large; numbers or short texts.
      timings: name -> seconds.
      table: rows of a comparison, all with the same keys, for example one a model; a
        cell {"text": str, "bad": True} is shown in red. A row whose first cell is the
        name of a phase leads to its curves.
      note: a sentence or two under the heading.

    Raises: ValueError if metrics.jsonl holds a line that is not JSON, or if evaluations
      or kept_step name a phase that metrics_rows has not.
    """
    out = located(out_dir)
    make_folder(out)
    if metrics_rows is None:
        metrics_rows = read_metrics(out / "metrics.jsonl")
    kept = by_phase("kept_step", kept_step, metrics_rows)
    measured = by_phase("evaluations", evaluations, metrics_rows)
    phases = {
        name: figures_of(by_step([*rows, *measured.get(name, ())]), kept.get(name))
        for name, rows in by_phase("metrics_rows", metrics_rows, metrics_rows).items()
    }
    tiles = {
        f"kept_step, {name}" if name else "kept_step": step
        for name, step in kept.items()
        if step is not None
    }
    text = render(
        "report.html.j2",
        title=title,
        note=note,
        warnings=warnings,
        summary=dict(summary or {}) | tiles,
        table=[dict(row) for row in table],
        phases=phases,
        anchors=anchors_of(phases),
        over_kl=OVER_KL,
        marked=bool(tiles),
        samples=samples,
        config=flatten(config or {}),
        timings=timings or {},
        environment=environment(),
    )
    path = out / "report.html"
    write_text(path, text)
    return path


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file; text in it is escaped."""
    import jinja2

    here = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page.filters |= {"number": format_value, "duration": format_seconds}
    page.filters["breakable"] = breakable
    return page.get_template(template).render(**values)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file, one a step; none if there is no file.

    Where a resumed run wrote a step again, the later row counts. A last line cut off
    by a kill is left out; any other broken line raises ValueError.
    """
    path = located(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number}: not JSON: {error}") from error
        rows.append(row)
    return by_step(rows)


def by_step(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, in their order; where rows of a step share a name, the last one
    counts. Rows without a step stay as they are, behind the others."""
    merged: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        key = row.get("step", ("row", number))
        merged[key] = merged.get(key, {}) | dict(row)
    last = float("inf")
    return sorted(merged.values(), key=lambda row: row.get("step", last))


def by_phase(name: str, value: Any, metrics_rows: Any) -> dict[str, Any]:
    """Phase -> its part of an argument; a single run is the phase "".

    Raises: ValueError where the argument and metrics_rows do not fit each other.
    """
    if not isinstance(metrics_rows, Mapping):
        if isinstance(value, Mapping):
            raise ValueError(f"{name} is by phase, but metrics_rows are of one run")
        return {"": value}
    if value in (None, (), [], {}):
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"metrics_rows are by phase: give {name} as phase -> value")
    if unknown := [phase for phase in value if phase not in metrics_rows]:
        known = ", ".join(map(repr, metrics_rows))
        raise ValueError(f"{name}: no phase {unknown[0]!r} in metrics_rows ({known})")
    return dict(value)


def anchors_of(phases: Mapping[str, Figures]) -> dict[str, str]:
    """Phase -> the id of its section, for those that have curves."""
    drawn = [name for name, figures in phases.items() if figures.drawn]
    return {name: f"curves-{number}" for number, name in enumerate(drawn, 1)}


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


def breakable(name: str) -> Any:
    """A name as HTML that a narrow column cuts behind _ and /, and not in a word."""
    from markupsafe import Markup, escape

    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(name))))


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
