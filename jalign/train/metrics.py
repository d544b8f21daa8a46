"""Metrics: fetched one step late, so that the device never waits for the host.

OUT/metrics.jsonl has one row a step, OUT/tensorboard the same as curves; a progress
bar shows the time left. Every process fetches (so that all see the same numbers);
only process 0 writes.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jalign import sharding
from jalign.mirror import Mirror
from jalign.models.quantize import CODES_PER_BYTE
from jalign.models.tensors import is_matrix
from jalign.paths import located, written

_log = logging.getLogger("jalign.train")
FIRST = ("loss", "learning_rate", "grad_norm", "num_tokens")


def peak_flops() -> float | None:
    """bf16 FLOP/s of all devices of the run together; None where not known."""
    here = sharding.machine()
    return here.chip.flops * here.num_devices if here.chip else None


def training_flops_per_token(
    params: Any, frozen: Any = None, *, experts: float = 1.0
) -> float:
    """6 times the parameters of the matrix products: forward 2, backward 4; and 4 times
    those of a frozen base beside adapters, which have no gradient of their own; of
    experts only `experts`, the share of them that a token goes to. Codes of a quantized
    kernel count as its weights.

    Attention scores and rematerialization are not counted, the input embedding only
    where it is also the output matrix.
    """

    def sizes(tree: Any) -> dict[str, int]:
        found = {}
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            kernel, _, codes = path.rpartition("/")
            per_byte = CODES_PER_BYTE.get(codes)
            found[kernel if per_byte else path] = leaf.size * (per_byte or 1)
        return found

    flops = {path: 4.0 * size for path, size in sizes(frozen).items()}
    flops |= {path: 6.0 * size for path, size in sizes(params).items()}
    products = {
        p: n for p, n in flops.items() if is_matrix(p) and "/embedding" not in p
    }
    products |= {p: experts * n for p, n in products.items() if "/experts/" in p}
    tied = not any(path.startswith(("unembed/", "score/")) for path in products)
    return sum(products.values()) + tied * flops.get("embed/embedding", 0.0)


OnStep = Callable[[int, dict[str, Any]], None]


class MetricsWriter:
    """Writes a row for every step of a run.

    Args:
      out_dir: the run's directory; rows of steps after `start_step`, left by a run that
        was killed after its last checkpoint, are cut off metrics.jsonl.
      total_steps: for the progress bar and its time left.
      start_step: steps already taken, when a run is continued.
      num_tokens: tokens already seen, likewise.
      flops_per_token: reports `mfu` where the device's peak is known; 0 does not.
      title: what the progress bar is called.
      on_step: called with (step, row) for each row, once it is known.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        total_steps: int,
        start_step: int = 0,
        num_tokens: float = 0.0,
        flops_per_token: float = 0.0,
        title: str = "train",
        on_step: OnStep | None = None,
    ):
        self._on_step = on_step
        self.num_tokens = num_tokens
        self._flops = flops_per_token
        self._peak = peak_flops() if flops_per_token else None
        self._pending: tuple[int, Mapping[str, Any], float] | None = None
        self._last_time = time.perf_counter()
        self._file = self._board = self._bar = self._mirror = None
        self._unwritten = b""
        if not sharding.is_main_process():
            return
        self._mirror = Mirror(located(out_dir))
        out = self._mirror.path
        truncate_rows(self._mirror.bring("metrics.jsonl"), start_step)
        # Unbuffered, so that what a full disk has taken of a row is known.
        self._file = open(out / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        self._board = _tensorboard(out / "tensorboard", start_step)
        self._bar = _Progress(title, total_steps, start_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
        """Takes a step's device metrics; fetches and writes those of the step before.

        Args:
          step: number of steps taken, this one included.
          metrics: float32 [] arrays, `num_tokens` among them (of this step alone); or
            numbers, which are written at once: no device runs ahead.

        Returns: the row written, if any; its `num_tokens` counts from the run's start.
        """
        row, now = self._write(self._pending), time.perf_counter()
        # From one call to the next, each after a fetch: a step's time, whether or not
        # the device runs ahead of the host.
        self._pending = (step, metrics, now - self._last_time)
        self._last_time = now
        on_host = not any(isinstance(x, jax.Array) for x in metrics.values())
        return self.flush() if on_host else row

    def flush(self) -> dict[str, Any] | None:
        """Fetches and writes the step that is still pending, if any."""
        before, self._pending = self._pending, None
        if before is not None:
            step, metrics, seconds = before
            start = time.perf_counter()
            jax.block_until_ready(dict(metrics))
            # The device had run ahead: the wait is the step's time.
            before = (step, metrics, max(seconds, time.perf_counter() - start))
        return self._write(before)

    def push(self) -> None:
        """Brings what is written to an OUT behind a URL, where it else comes now and
        then; a failure is logged, and what is there kept. Call it after flush."""
        if self._mirror is not None:
            if self._board is not None and _is_alive(self._board):
                self._board.flush()
            self._mirror.try_push(now=True)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes held-out figures of a step as a row of their own; none, no row.

        Call it after flush, so that rows stand in their order.
        """
        if figures:
            self._record({"step": step} | dict(figures))
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last row (an evaluation) out of the next one."""
        self._last_time = time.perf_counter()

    def close(self) -> None:
        """Writes what is pending and closes the files."""
        self.flush()
        if self._unwritten:
            self._append("")
        for part in (self._file, self._board, self._bar):
            if part is not None:
                try:
                    part.close()
                except OSError as error:  # the curves, of a full disk
                    _log.error("%s", error)
        if self._mirror is not None:
            self._mirror.try_push(now=True)
            self._mirror.close()
        self._file = self._board = self._bar = self._mirror = None

    def _write(self, pending) -> dict[str, Any] | None:
        if pending is None:
            return None
        step, metrics, seconds = pending
        values = {name: float(x) for name, x in jax.device_get(dict(metrics)).items()}
        row = self._row(step, values, seconds)
        self._record(row)
        if self._bar is not None:
            self._bar.update(row)
        if self._on_step is not None:
            self._on_step(step, dict(row))
        return row

    def _record(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, and its points of the curves."""
        if self._file is not None:
            # Not finite is null: NaN is no JSON, and 0 would be a lie.
            clean = {k: v if math.isfinite(v) else None for k, v in row.items()}
            self._append(json.dumps(clean) + "\n")
        if self._board is not None and _is_alive(self._board):
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])
        if self._mirror is not None:
            self._mirror.try_push()

    def _append(self, line: str) -> None:
        """Writes to metrics.jsonl; what a full disk does not take waits in memory."""
        assert self._file is not None
        waiting = bool(self._unwritten)
        self._unwritten += line.encode()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waiting:
                text = "%s: %s; its rows are kept until it can be written"
                _log.error(text, self._file.name, error.strerror)

    def _row(self, step: int, values: dict[str, float], seconds: float):
        tokens = values.get("num_tokens", 0.0)
        self.num_tokens += tokens
        values = values | {"num_tokens": self.num_tokens}
        row: dict[str, Any] = {"step": step}
        row |= {name: values.pop(name) for name in FIRST if name in values}
        row |= {"step_time": seconds, "tokens_per_second": tokens / seconds}
        if self._peak:
            row["mfu"] = self._flops * tokens / seconds / self._peak
        return row | values


def truncate_rows(path: Path, last_step: int) -> None:
    """Cuts the rows after `last_step`, and a torn last line, off a metrics.jsonl."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    with written(path) as here:
        here.write_text("".join(kept), encoding="utf-8")


def _tensorboard(log_dir: Path, start_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        _log.info("tensorboardX is not installed: no curves in %s", log_dir)
        return None
    purge = start_step + 1 if start_step else None
    # Room for all numbers of a step: a writer whose disk is full takes none.
    return SummaryWriter(str(log_dir), purge_step=purge, max_queue=1000)


def _is_alive(board: Any) -> bool:
    """Whether the thread behind the curves still writes; one that a full disk has
    ended would be waited for without end."""
    events = getattr(board.file_writer, "event_writer", None)
    worker = getattr(events, "_worker", None)
    return worker is None or worker.is_alive()


class _Progress:
    """A bar on a terminal; elsewhere (a log file) a line now and then."""

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, title: str, total: int, start: int):
        from tqdm import tqdm

        self._title, self._total, self._start = title, total, start
        self._began = self._said = time.perf_counter()
        self._bar = tqdm(
            total=total, initial=start, desc=title, unit="step", disable=None
        )

    def update(self, row: Mapping[str, Any]) -> None:
        loss, speed = row.get("loss", math.nan), row["tokens_per_second"]
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tok/s", False)
            self._bar.update(row["step"] - self._bar.n)
            return
        now, step = time.perf_counter(), row["step"]
        if now - self._said < self.SECONDS_BETWEEN_LINES and step != self._total:
            return
        self._said = now
        each = (now - self._began) / max(step - self._start, 1)
        left = each * (self._total - step)
        print(
            f"{self._title} {step}/{self._total}  loss {loss:.4f}  "
            f"{speed:,.0f} tok/s  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        self._bar.close()
