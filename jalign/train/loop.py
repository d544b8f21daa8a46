"""The loop of every run: read it top to bottom, copy it when you need another one."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jax.sharding import Mesh

from jalign import sharding
from jalign.data import PackedRow, batch_indices
from jalign.train.checkpoint import Checkpointer
from jalign.train.evaluations import Evaluations, unmeasured
from jalign.train.metrics import MetricsWriter
from jalign.train.stop import Preempted, StopSignal
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")


class Diverged(ValueError):
    """Too many steps had a loss, gradient or new weights that are not finite."""


class SkipGuard:
    """Counts skipped steps; raises Diverged where a run cannot be said to have worked.

    The weights are still good then: the steps changed nothing.

    Args:
      skipped: numbers of the steps skipped before, when a run is continued.
      limit: of steps in a row.
      names: step -> its rows, for messages.
    """

    def __init__(
        self,
        skipped: Sequence[int] = (),
        *,
        limit: int = 10,
        names: Callable[[int], str] = lambda step: "not known",
    ):
        self.skipped, self.limit, self.names = list(skipped), limit, names

    def check(self, row: Mapping[str, Any] | None) -> None:
        """Takes a row of MetricsWriter (or None)."""
        if row is None or not row.get("skipped"):
            return
        step = int(row["step"])
        self.skipped.append(step)
        finite = all(math.isfinite(row.get(k, 0.0)) for k in ("loss", "grad_norm"))
        what = "new weights" if finite else "loss or gradient"
        rows = self.names(step)
        _log.warning(
            "step %d skipped: its %s is not finite; rows: %s", *(step, what, rows)
        )
        if self.in_a_row(step) >= self.limit:
            self._fail(f"{self.limit} steps in a row", step)

    def in_a_row(self, step: int) -> int:
        """How many steps up to this one were skipped without a good one between."""
        found = set(self.skipped)
        return next(n for n in itertools.count() if step - n not in found)

    def finish(self, steps: int) -> None:
        """At the end of a run of so many steps. Raises: Diverged where a fifth of them
        or the last ones (two or more) were skipped."""
        if not self.skipped:
            return
        text = f"{len(self.skipped)} of {steps} steps"
        if self.in_a_row(steps) > 1 or 5 * len(self.skipped) >= steps:
            self._fail(text, steps)
        _log.warning("%s were skipped: steps %s", text, _listed(self.skipped))

    def summary(self) -> dict[str, int]:
        """skipped_steps, where there are any."""
        return {"skipped_steps": len(self.skipped)} if self.skipped else {}

    def _fail(self, what: str, step: int) -> NoReturn:
        last = self.skipped[-3:]
        rows = "; ".join(f"step {number}: {self.names(number)}" for number in last)
        raise Diverged(
            f"{what} were skipped, up to step {step}, since their loss, gradient or "
            f"new weights were not finite (steps {_listed(self.skipped)}; rows of "
            f"{rows}). Nothing is exported, the checkpoints hold good weights. "
            "Start anew by --no-resume with a lower --learning-rate or without these "
            "rows; or go on to more --steps (--reschedule)"
        )


def _listed(steps: Sequence[int], most: int = 20) -> str:
    """ "2, 5 to 9"; the first `most` of these spans."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    more = f" and {len(spans) - most} more" if len(spans) > most else ""
    texts = [f"{a} to {b}" if a < b else str(a) for a, b in spans[:most]]
    return ", ".join(texts) + more


def row_namer(
    rows: Sequence[Any], examples: Sequence[Any], config: Any
) -> Callable[[int], str]:
    """A function from a step's number (from 1) to where its rows come from.

    Args:
      rows: of load_rows. Where there is not one for each example (some were left out,
        or packed), the examples' numbers are told.
      examples: what the batches are made of.
      config: the run's, for batch_size and seed.
    """
    one_each = len(rows) == len(examples) and not isinstance(examples[0], PackedRow)

    def name(i: int) -> str:
        number = f"example {i + 1} of {len(examples)}"
        return getattr(rows[i], "origin", number) if one_each else number

    def of(step: int, most: int = 8) -> str:
        order = config.batch_size, config.seed, step - 1
        found = batch_indices(len(examples), *order)
        numbers = sorted(set(found.tolist()))
        more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
        return ", ".join(map(name, numbers[:most])) + more

    return of


def whole_state(state: Any) -> tuple[PyTree, dict[str, float]]:
    """What a checkpoint holds of a TrainState: its arrays, and no numbers."""
    return {"state": state}, {}


def fit(
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    batches: Iterable[Any],
    *,
    steps: int,
    writer: MetricsWriter,
    checkpointer: Checkpointer | None = None,
    checkpoint_every: int = 0,
    meta: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    on_step: Callable[[int, Any], None] | None = None,
    stop: StopSignal | None = None,
    guard: SkipGuard | None = None,
    evaluations: Evaluations | None = None,
    stored: Callable[[Any], tuple[PyTree, Mapping[str, float]]] = whole_state,
) -> Any:
    """Trains until `steps` steps have been taken, from wherever the state stands.

    A step of an online run is an iteration, of a rollout and all its updates. The
    state is saved between steps only: a kill at any time goes back to a boundary.

    Args:
      state: a TrainState, or another with `step` and `params`; donated: continue with
        the returned one.
      step_fn: (state, batch) -> (state, metrics), as of make_train_step.
      batches: this process's rows as numpy trees, from step int(state.step) on.
      steps: number of steps of the whole run.
      writer: takes the metrics.
      checkpointer: saves {"state": state}; None never does.
      checkpoint_every: steps between checkpoints; 0 saves only at the end and when
        asked to stop.
      meta: stored with each checkpoint, together with num_tokens and skipped steps.
      mesh: where the batches go.
      on_step: called with (steps taken, state) after each step.
      stop: of the run; None watches the signals in here alone.
      guard: of the run, which knows the steps skipped before and the rows.
      evaluations: held-out measurements, at the end and in between where they are due;
        the best checkpoint stays, and training ends where they say so.
      stored: state -> (arrays, numbers) of a checkpoint.

    Returns: the last state.
    Raises: Preempted after a SIGTERM or SIGINT, once the state is saved; Diverged.
    """
    step = saved = int(state.step)
    guard, stop = guard or SkipGuard(), stop or StopSignal()
    seen = evaluations or unmeasured()
    if checkpointer is not None:
        checkpointer.protected = seen.kept

    def save() -> None:
        nonlocal saved
        guard.check(writer.flush())
        writer.push()  # the rows of this checkpoint's steps
        if checkpointer is not None and saved != step:
            tree, numbers = stored(state)
            record = {**(meta or {}), **numbers, "skipped": guard.skipped}
            record |= {"num_tokens": writer.num_tokens} | seen.record()
            checkpointer.save(step, tree, record)
            # Only now: until this one is written the best before it is not lost.
            checkpointer.protected = seen.kept
            saved = step
        writer.restart_clock()

    def over() -> bool:
        if seen.over and step < steps:
            _log.warning(
                "training ends after step %d of %d: %s", step, steps, seen.over
            )
        return step >= steps or seen.over is not None

    def evaluate() -> None:
        guard.check(writer.flush())
        writer.add(step, seen.measure(step, state.params))

    source = iter(batches)
    with stop:
        with stop.deferred():
            while not over():
                if stop.requested(step):
                    save()
                    raise_preempted(step, checkpointer)
                batch = next(source)
                state, metrics = step_fn(state, sharding.put_batch(batch, mesh))
                step += 1
                row = writer.log(step, metrics)
                if row is not None:  # of the step before: this one may still compute
                    sharding.alive(f"step {row['step']}")
                guard.check(row)
                if on_step is not None:
                    on_step(step, state)
                periodic = bool(checkpoint_every) and step % checkpoint_every == 0
                if seen.due(step):
                    evaluate()
                    periodic |= seen.kept == step
                if periodic and step < steps:
                    save()
            save()
            if checkpointer is not None:
                checkpointer.wait()
            guard.finish(step)
        evaluate()  # nothing is lost where it is stopped here
    return state


def raise_preempted(step: int, checkpointer: Checkpointer | None) -> None:
    """Waits for the checkpoint (OSError if it cannot be written), raises Preempted."""
    if checkpointer is not None:
        checkpointer.close()
    if checkpointer is None or not checkpointer.steps():
        raise Preempted(f"stopped at step {step}; nothing was saved")
    raise Preempted(
        f"stopped at step {step}, saved in {checkpointer.directory}; the same command "
        "continues from there"
    )
