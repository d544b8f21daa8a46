"""The loop of online runs: rollouts and their updates, until done or stopped."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from jalign.train.checkpoint import Checkpointer
from jalign.train.evaluations import Evaluation, Evaluations
from jalign.train.loop import SkipGuard, raise_preempted
from jalign.train.metrics import MetricsWriter, OnStep
from jalign.train.online_config import OnlineConfig
from jalign.train.rollout import ROLLOUT_KL
from jalign.train.stop import StopSignal
from jalign.types import TrainState

_log = logging.getLogger("jalign.train")
State = Any
"""A NamedTuple: a TrainState for each model of the learner, by its name, `iteration`,
and numbers."""


def fit(
    state: State,
    advance: Callable[[State], tuple[State, dict[str, float]]],
    *,
    config: OnlineConfig,
    iterations: int,
    checkpointer: Checkpointer | None = None,
    meta: Mapping[str, Any] | None = None,
    title: str = "online",
    stop: StopSignal | None = None,
    guard: SkipGuard | None = None,
    evaluations: Evaluations | None = None,
    on_step: OnStep | None = None,
) -> State:
    """Iterates until `iterations` rollouts have been learned from.

    Models, controllers and position are saved in one step, between iterations only: a
    kill at any time goes back to a boundary, with all of them.

    Args:
      state: from where; donated.
      advance: state -> (next state, metrics), one iteration.
      config: for OUT and how often to save.
      iterations: of the whole run.
      checkpointer: None saves nothing.
      meta: JSON values stored with each checkpoint.
      title: of the progress bar.
      stop, guard, evaluations: of the run, as in loop.fit.
      on_step: called with (iteration, its row of metrics).

    Raises: Preempted, once the state is saved; Diverged.
    """
    meta = dict(meta or {})
    guard, stop = guard or SkipGuard(), stop or StopSignal()
    if evaluations is None:
        evaluations = Evaluations(lambda params: Evaluation({}, []), config)
    writer = MetricsWriter(
        config.out,
        total_steps=iterations,
        start_step=state.iteration,
        num_tokens=meta.get("num_tokens", 0.0),
        title=title,
        on_step=on_step,
    )

    def save() -> None:
        if checkpointer is not None:
            tree, numbers = divide(state)
            record = meta | numbers | {"skipped": guard.skipped}
            record |= {"num_tokens": writer.num_tokens} | evaluations.record()
            checkpointer.save(state.iteration, tree, record)
            # Only now: until this one is written the best before it is not lost.
            checkpointer.protected = evaluations.kept
        writer.restart_clock()

    def over() -> bool:
        reason = evaluations.over
        if reason and state.iteration < iterations:
            said = state.iteration, iterations, reason
            _log.warning("training ends after iteration %d of %d: %s", *said)
        return bool(reason) or state.iteration >= iterations

    every, saved = config.checkpoint_every, state.iteration
    if checkpointer is not None:
        checkpointer.protected = evaluations.kept
    with contextlib.closing(writer), stop:
        with stop.deferred():
            while not over():
                if stop.requested(state.iteration):
                    if saved != state.iteration:
                        save()
                    raise_preempted(state.iteration, checkpointer)
                state, metrics = advance(state)
                number = state.iteration
                # The metrics are on the host already: written now, with their own time.
                writer.log(number, metrics)
                evaluations.rollout(number, metrics.get(ROLLOUT_KL, 0.0))
                guard.check(writer.flush())
                if evaluations.due(number):
                    figures = evaluations.measure(number, state.policy.params)
                    writer.add(number, figures)
                last = number == iterations or evaluations.over is not None
                best = evaluations.kept == number
                if last or best or (every and number % every == 0):
                    save()
                    saved = number
            if checkpointer is not None:
                checkpointer.wait()
            guard.finish(state.iteration)
        # Nothing is lost where it is stopped here.
        figures = evaluations.measure(state.iteration, state.policy.params)
        writer.add(state.iteration, figures)
    return state


def divide(state: State) -> tuple[dict[str, TrainState], dict[str, float]]:
    """A state's models and its numbers, by name; the iteration is neither."""
    fields = state._asdict()
    fields.pop("iteration")
    trees = {k: v for k, v in fields.items() if isinstance(v, TrainState)}
    return trees, {k: v for k, v in fields.items() if isinstance(v, float)}
