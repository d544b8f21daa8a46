"""From the results of many runs to one row of the table. Pure functions."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

TOLERANCE = 1e-3  # relative, of the first losses


def step_seconds(result: Mapping[str, Any]) -> float:
    """The median of the timed steps of a run."""
    return median(result["seconds"][result["warm"] :])


def cpu_seconds(result: Mapping[str, Any]) -> float | None:
    """CPU time of a timed step, their median; None where it was not measured."""
    timed = result["cpu"][result["warm"] :]
    return median(timed) if timed else None


def total_seconds(result: Mapping[str, Any]) -> float:
    """All timed steps, each as long as the median: one may have been held up."""
    return step_seconds(result) * (len(result["seconds"]) - result["warm"])


def ratio(
    peer: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]
) -> float:
    """How many times longer the peer takes: the median over pairs of neighbours.

    The runs alternate, so a pair saw the same machine; a slow minute cancels.
    """
    pairs = zip(peer, ours, strict=True)
    return median(step_seconds(p) / step_seconds(o) for p, o in pairs)


def cpu_ratio(
    peer: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]
) -> float | None:
    """The same of CPU time, where both have it."""
    times = [(cpu_seconds(p), cpu_seconds(o)) for p, o in zip(peer, ours, strict=True)]
    known = [p / o for p, o in times if p is not None and o is not None]
    return median(known) if known else None


def loss_gap(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The largest relative difference of the first losses; None without any."""
    if not a or not b:
        return None
    pairs = list(zip(a, b, strict=True))
    return max(abs(x - y) / max(abs(x), abs(y), 1e-12) for x, y in pairs)


def compile_seconds(result: Mapping[str, Any]) -> float:
    """What the warm steps took beyond the timed steps of the same rows."""
    warm = result["warm"]
    timed = result["seconds"][warm:]
    return max(0.0, sum(result["seconds"][:warm]) - sum(timed[:warm]))


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over a framework's runs of one piece of work."""
    cpu = [cpu_seconds(run) for run in runs]
    return {
        "runs": len(runs),
        "step_s": median(map(step_seconds, runs)),
        "step_s_range": [min(map(step_seconds, runs)), max(map(step_seconds, runs))],
        "cpu_s": None if None in cpu else median(cpu),
        "tokens_per_s": median(r["tokens"] / total_seconds(r) for r in runs),
        "examples_per_s": median(r["examples"] / total_seconds(r) for r in runs),
        "first_step_s": median(r["seconds"][0] for r in runs),
        "compile_s": median(map(compile_seconds, runs)),
        "rss_peak": max(r["rss_peak"] for r in runs),
        "rss_imported": median(r["rss_imported"] for r in runs),
        "losses": runs[0]["losses"],
    }


def rows_of(
    results: Mapping[str, Any],
    floors: Mapping[str, float],
    starts: Mapping[str, Any] | None = None,
) -> list[dict]:
    """Table rows: for each model and piece, jalign first and then its peers.

    Args:
      results: {"MODEL/PIECE": {framework: [result of a run, ...] or why there is none}}
      floors: {"MODEL/PIECE": least seconds of a step}, where known.
      starts: {"MODEL/PIECE": {framework: [seconds of a cold start, ...] or why not}}.
    """
    starts, rows = starts or {}, []
    for name in dict.fromkeys([*results, *starts]):
        warm, cold = results.get(name, {}), starts.get(name, {})
        for framework in dict.fromkeys([*warm, *cold]):
            row: dict[str, Any] = {"work": name, "framework": framework}
            if framework in warm:
                # A is drawn by each framework, so only the first loss is the base's.
                alike = 1 if "/lora-" in name else None
                row |= warm_columns(framework, warm, floors.get(name), alike)
            if framework in cold:
                row |= cold_columns(framework, cold)
            rows.append(row)
    return rows


def warm_columns(
    framework: str,
    runs: Mapping[str, Any],
    floor: float | None,
    alike: int | None = None,
) -> dict[str, Any]:
    """What is said of a framework's warm steps beside those of jalign, of whose first
    losses so many are to be equal (None: all)."""
    mine, ours = runs[framework], runs.get("jalign")
    if isinstance(mine, str):
        return {"missing": mine}
    row = summarize(mine)
    if framework == "jalign" and floor is not None:
        row["floor"] = floor / row["step_s"]
    elif framework != "jalign" and isinstance(ours, list):
        row["ratio"] = ratio(mine, ours)
        row["cpu_ratio"] = cpu_ratio(mine, ours)
        first = (run[0]["losses"][:alike] for run in (mine, ours))
        row["loss_gap"] = loss_gap(*first)
    return row


def cold_columns(framework: str, starts: Mapping[str, Any]) -> dict[str, Any]:
    """Median seconds of a framework's cold starts, and the median over the turns of how
    many times as long as jalign's they are."""
    mine, ours = starts[framework], starts.get("jalign")
    if isinstance(mine, str):
        return {"cold_missing": mine}
    row = {"cold_s": median(mine)}
    if framework != "jalign" and isinstance(ours, list):
        row["cold_ratio"] = median(p / o for p, o in zip(mine, ours, strict=True))
    return row


def disagreements(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each peer whose losses are not jalign's."""
    return [
        f"{row['work']}: the first losses of {row['framework']} and jalign differ by "
        f"{row['loss_gap']:.1e} (more than {TOLERANCE:.0e})"
        for row in rows
        if (row.get("loss_gap") or 0.0) > TOLERANCE
    ]
