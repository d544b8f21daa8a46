"""The driver: `python -m benchmarks`. Alternates the frameworks, a process a run."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import assets, cold, compare, floor, measure, settings, table
from benchmarks.settings import BUILD, MODELS, PEERS, PIECES, ROOT


def main() -> int:
    """Measures, prints the table, writes build/bench/results.json and results.md."""
    args = parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    hold_cores(settings.THREADS)
    machine = describe_machine()
    rate = run_json([args.jalign, "-m", "benchmarks.floor"])["flops_per_second"]
    machine["float32 matrix product, GFLOP/s"] = round(rate / 1e9)
    results: dict[str, Any] = {}
    starts: dict[str, Any] = {}
    floors: dict[str, float] = {}
    for model in args.model:
        run_python(
            args.jalign, f"from benchmarks import assets; assets.ensure({model!r})"
        )
        rows = assets.read_rows(model)
        machine["rows"] = rows["source"]
        for piece in args.only:
            name = f"{model}/{piece}"
            flops = floor.step_flops(piece, MODELS[model], rows)
            if flops is not None:
                floors[name] = flops / rate
            if args.repeats:
                results[name] = run_piece(args, piece, model)
            if args.cold and piece in settings.COLD:
                starts[name] = run_cold(args, piece, model)
            write(results, floors, starts, machine)
    return finish(results, floors, starts, machine)


def parse_args() -> argparse.Namespace:
    """Options; each peer's Python is given by the Makefile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--only", type=names, default=list(PIECES), help="sft,dpo,...")
    parser.add_argument("--model", type=names, default=["7m"], help="7m,40m")
    parser.add_argument("--peers", type=names, default=list(PEERS), help="trl,tunix")
    parser.add_argument("--repeats", type=int, default=3, help="warm runs of each")
    parser.add_argument("--cold", type=int, default=1, help="cold starts of each")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds of a run")
    parser.add_argument("--jalign", default=sys.executable, help="Python of jalign")
    parser.add_argument("--trl", default=".venv-parity/bin/python")
    parser.add_argument("--tunix", default=".venv-tunix/bin/python")
    args = parser.parse_args()
    for name, known in (("only", PIECES), ("model", MODELS), ("peers", PEERS)):
        for value in getattr(args, name):
            if value and value not in known:
                parser.error(f"--{name}: {value!r} is not one of {', '.join(known)}")
    args.peers = [peer for peer in args.peers if peer]
    return args


def hold_cores(count: int) -> None:
    """Holds this process and its children to the first cores that it may use."""
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, allowed[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "CPU": cpu,
        "cores used": len(os.sched_getaffinity(0)),
        "cores of the machine": os.cpu_count(),
        "load at the start": round(os.getloadavg()[0], 1),
    }


def run_piece(args: argparse.Namespace, piece: str, model: str) -> dict[str, Any]:
    """{framework: its runs, or why it has none}; the frameworks take turns."""
    pythons = {"jalign": args.jalign} | {
        peer: getattr(args, peer) for peer in args.peers
    }
    runs: dict[str, Any] = {name: [] for name in pythons}
    for number in range(args.repeats):
        for name, python in pythons.items():
            if isinstance(runs[name], str):
                continue
            print(f"{model} {piece} {name} {number + 1}", file=sys.stderr, flush=True)
            result = run_worker(python, name, piece, model, args.timeout)
            if isinstance(result, str):
                runs[name] = result
            else:
                runs[name].append(result)
    return runs


def run_cold(args: argparse.Namespace, piece: str, model: str) -> dict[str, Any]:
    """{framework: seconds to the end of a step from its start, ...}, taking turns."""
    pythons = {
        name: getattr(args, name)
        for name in settings.COLD_FRAMEWORKS
        if name in ("jalign", *args.peers)
    }
    found: dict[str, Any] = {name: [] for name in pythons}
    for number in range(args.cold):
        for name, python in pythons.items():
            if isinstance(found[name], str):
                continue
            print(f"{model} {piece} {name} cold {number + 1}", file=sys.stderr)
            result = cold.run(python, name, piece, model, args.timeout)
            if isinstance(result, str):
                found[name] = result
            else:
                found[name].append(result)
    return found


def run_worker(
    python: str, name: str, piece: str, model: str, timeout: int
) -> dict[str, Any] | str:
    """A worker's result, or in a few words why there is none."""
    if not Path(python).exists():
        return f"not measured: {python} is missing"
    log = BUILD / f"{model}-{piece}-{name}.log"
    command = [python, "-m", f"benchmarks.worker_{name}", piece, model]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"not measured: more than {timeout} s"
    log.write_text(done.stdout + done.stderr, "utf-8")
    if done.returncode == 3:
        return done.stderr.strip().splitlines()[-1]
    marked = [x for x in done.stdout.splitlines() if x.startswith(measure.MARK)]
    if done.returncode or not marked:
        return f"failed: see {log.relative_to(ROOT)}"
    return json.loads(marked[-1].removeprefix(measure.MARK))


def run_python(python: str, code: str) -> None:
    """Runs code in another environment; raises CalledProcessError if it fails."""
    subprocess.run([python, "-c", code], cwd=ROOT, check=True)


def run_json(command: list[str]) -> dict[str, Any]:
    """The JSON that a command prints last."""
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def write(results, floors, starts, machine) -> list[dict[str, Any]]:
    """Writes both files anew; returns the table's rows."""
    rows = compare.rows_of(results, floors, starts)
    record = {"machine": machine, "floors_s": floors, "rows": rows, "runs": results}
    record["cold_s"] = starts
    (BUILD / "results.json").write_text(json.dumps(record, indent=1), "utf-8")
    (BUILD / "results.md").write_text(table.markdown(rows, machine), "utf-8")
    return rows


def finish(results, floors, starts, machine) -> int:
    """Prints the table and what is wrong with it; 1 if jalign failed somewhere."""
    rows = write(results, floors, starts, machine)
    print(table.markdown(rows, machine))
    for warning in compare.disagreements(rows):
        print(f"warning: {warning}", file=sys.stderr)
    failed = [
        f"{row['work']}: {row[key]}"
        for row in rows
        for key in ("missing", "cold_missing")
        if row["framework"] == "jalign" and key in row
    ]
    for text in failed:
        print(f"error: {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
