"""The offline loop: read it top to bottom, copy it when you need another one."""

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jalign import sharding
from jalign.train.checkpoint import Checkpointer
from jalign.train.metrics import MetricsWriter
from jalign.train.step import TrainStep
from jalign.types import TrainState

_log = logging.getLogger("jalign.train")


class Preempted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state."""


class Diverged(ValueError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class StopSignal:
    """A context in which SIGTERM and SIGINT only ask to stop, once.

    `requested(step)` is true on every process at the same step. A second signal of
    the same kind acts as usual. With jax.distributed, SIGTERM is left to jax, whose
    notifier tells the other processes.
    """

    def __init__(self):
        self._asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            alone = not jax.distributed.is_initialized()
            for number in (signal.SIGTERM, signal.SIGINT) if alone else ():
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def _handle(self, number, _frame):
        self._asked = True
        name = signal.Signals(number).name
        _log.warning("%s: stopping after this step, with a checkpoint", name)
        signal.signal(number, self._old.pop(number))

    def requested(self, step: int) -> bool:
        """Whether to save and leave now; call it after every step."""
        return self._asked or sharding.preempted(step)


class SkipGuard:
    """Counts skipped steps in a row; raises Diverged at the limit.

    The weights are still good then: the step changed nothing.
    """

    def __init__(self, limit: int = 10):
        self.limit, self.row_steps = limit, []

    def check(self, row: Mapping[str, Any] | None) -> None:
        """Takes a row of MetricsWriter (or None)."""
        if row is None or not row.get("skipped"):
            if row is not None:
                self.row_steps = []
            return
        self.row_steps.append(row["step"])
        _log.warning("step %d skipped: its loss or gradient is not finite", row["step"])
        if len(self.row_steps) >= self.limit:
            raise Diverged(
                f"loss or gradient was not finite in {self.limit} steps in a row "
                f"({self.row_steps[0]} to {self.row_steps[-1]}): lower learning_rate, "
                "or look at the rows of these steps; the last checkpoint is good"
            )


def fit(
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterable[Any],
    *,
    steps: int,
    writer: MetricsWriter,
    checkpointer: Checkpointer | None = None,
    checkpoint_every: int = 0,
    meta: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    on_step: Callable[[int, TrainState], None] | None = None,
) -> TrainState:
    """Trains until `steps` steps have been taken, from wherever the state stands.

    Args:
      state: donated; continue with the returned one.
      step_fn: of make_train_step.
      batches: this process's rows as numpy trees, from step int(state.step) on.
      steps: number of steps of the whole run.
      writer: takes the metrics.
      checkpointer: saves {"state": state}; None never does.
      checkpoint_every: steps between checkpoints; 0 saves only at the end and when
        asked to stop.
      meta: stored with each checkpoint, together with num_tokens.
      mesh: where the batches go.
      on_step: called with (steps taken, state) after each step.

    Returns: the state after `steps` steps.
    Raises: Preempted after a SIGTERM or SIGINT, once the state is saved; Diverged.
    """
    step, guard, shapes = int(state.step), SkipGuard(), set()
    saved = step

    def save() -> None:
        nonlocal saved
        guard.check(writer.flush())
        if checkpointer is not None and saved != step:
            record = dict(meta or {}) | {"num_tokens": writer.num_tokens}
            checkpointer.save(step, {"state": state}, record)
            saved = step
        writer.restart_clock()

    source = iter(batches)
    with StopSignal() as stop:
        while step < steps:
            batch = next(source)
            _log_new_shape(batch, shapes)
            state, metrics = step_fn(state, sharding.put_batch(batch, mesh))
            step += 1
            guard.check(writer.log(step, metrics))
            if on_step is not None:
                on_step(step, state)
            if checkpoint_every and step % checkpoint_every == 0 and step < steps:
                save()
            if step < steps and stop.requested(step):
                save()
                raise_preempted(step, checkpointer)
        save()
    if checkpointer is not None:
        checkpointer.wait()
    return state


def raise_preempted(step: int, checkpointer: Checkpointer | None) -> None:
    """Closes the checkpointer (OSError if it could not write), raises Preempted."""
    if checkpointer is None:
        raise Preempted(f"stopped at step {step}; nothing was saved")
    checkpointer.close()
    raise Preempted(
        f"stopped at step {step}, saved in {checkpointer.directory}; the same command "
        "continues from there"
    )


def _log_new_shape(batch, shapes: set) -> None:
    """Says when a step will be compiled: each length bucket is, once."""
    shape = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
    if shape not in shapes:
        shapes.add(shape)
        _log.info(
            "compiling the step for batches of %s", " x ".join(map(str, shape[0]))
        )
