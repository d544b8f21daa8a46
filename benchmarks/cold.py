"""From the start of a command to the end of a step, with nothing compiled before.

Both frameworks are started as a user starts them: imports, model, text rows, tokens and
compilation count. Each appends a line to metrics.jsonl when a step is done, and the
clock stops when the last one is there.
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks import assets, settings
from benchmarks.settings import BUILD, COLD_STEPS, ROOT

POLL = 0.02  # seconds between two looks at the file


def command(python: str, framework: str, piece: str, model: str, out: Path):
    """The words that start a run.

    Args:
      python: of the framework's environment.
      framework: jalign or trl.
      piece, model: of settings.COLD and settings.MODELS.
      out: the run's folder.
    """
    start, rows = inputs(piece, model)
    if framework == "trl":
        return [python, "-m", "benchmarks.cold_trl", piece, str(start), str(rows), out]
    flags = {
        "model": start,
        "data": rows,
        "out": out,
        "steps": COLD_STEPS,
        "batch-size": settings.ROWS,
        "max-length": settings.LENGTH,
        "learning-rate": settings.LEARNING_RATE[piece],
        "schedule": "constant",
        "max-grad-norm": settings.MAX_GRAD_NORM,
        "checkpoint-every": 0,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return [python, "-m", "jalign", piece, *map(str, words)]


def inputs(piece: str, model: str) -> tuple[Path, Path]:
    """(checkpoint, rows) of a piece; reward models start with a scalar head."""
    folder = assets.folder(model)
    start = folder / ("reward" if piece == "reward" else "model")
    return start, folder / ("cold-sft.jsonl" if piece == "sft" else "cold-pairs.jsonl")


def run(
    python: str, framework: str, piece: str, model: str, timeout: float
) -> float | str:
    """Seconds from the start to the end of step COLD_STEPS, or why there are none."""
    if not Path(python).exists():
        return f"not measured: {python} is missing"
    out = assets.folder(model) / f"{framework}-cold-{piece}"
    shutil.rmtree(out, ignore_errors=True)
    log = BUILD / f"{model}-{piece}-{framework}-cold.log"
    with tempfile.TemporaryDirectory() as empty, log.open("w") as text:
        environment = {k: v for k, v in os.environ.items() if k not in _CACHES}
        environment["XDG_CACHE_HOME"] = empty
        words = command(python, framework, piece, model, out)
        start = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=text, stderr=subprocess.STDOUT
        )
        try:
            seconds = wait_for_step(out / "metrics.jsonl", process, start, timeout)
            process.wait(timeout)
        except (TimeoutError, subprocess.TimeoutExpired):
            return f"not measured: more than {timeout:.0f} s"
        finally:
            process.kill()
            process.wait()
    if seconds is None or process.returncode:
        return f"failed: see {log.relative_to(ROOT)}"
    check_losses(out / "metrics.jsonl")
    return seconds


# Where compiled programs or read data would be found again.
_CACHES = ("JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_DATASETS_CACHE")


def wait_for_step(
    file: Path, process: subprocess.Popen, start: float, timeout: float
) -> float | None:
    """Seconds from start until the file has a line for each step; None if the process
    ends without them.

    Raises: TimeoutError.
    """
    while time.perf_counter() - start < timeout:
        ended = process.poll() is not None
        if file.exists() and file.read_bytes().count(b"\n") >= COLD_STEPS:
            return time.perf_counter() - start
        if ended:
            return None
        time.sleep(POLL)
    raise TimeoutError


def check_losses(file: Path) -> None:
    """Raises ValueError unless there are COLD_STEPS rows, each with a finite loss."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    if [row["step"] for row in rows] != list(range(1, COLD_STEPS + 1)):
        raise ValueError(f"{file}: not the rows of {COLD_STEPS} steps")
    if not all(math.isfinite(row["loss"]) for row in rows):
        raise ValueError(f"{file}: a loss is not finite")
