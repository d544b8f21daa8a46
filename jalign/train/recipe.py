"""The way that all recipes go once their models are loaded: measure, train, measure,
save, report."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jalign import report, sharding
from jalign.data import PromptExample
from jalign.settings import as_text
from jalign.train.checkpoint import Restored
from jalign.train.evaluations import Evaluation, Evaluations
from jalign.train.loop import SkipGuard, fit, whole_state
from jalign.train.metrics import MetricsWriter
from jalign.train.run import Run, kept_tree, restore_state
from jalign.train.step import abstract_state
from jalign.train.trained import Trained, Trainer
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")


def measure_start(
    run: Run, params: PyTree, look: Callable[[PyTree], Evaluation], *, digest: str
) -> Evaluations:
    """The run's evaluations, of which the first, of the start parameters, is made.

    Args:
      look: parameters -> Evaluation.
      digest: of all that the figures depend on beside the weights.
    """
    how = {"record": run.previous, "on_eval": run.callbacks.on_eval}
    evaluations = Evaluations(look, run.config, digest=digest, **how)
    evaluations.measure(0, params)
    run.clock.lap("evaluate before")
    return evaluations


def resumed(
    run: Run, parts: Mapping[str, Trained], trainers: Mapping[str, Trainer], steps: int
) -> Restored | None:
    """The newest good checkpoint of what is trained, by name; or None.

    Raises: ValueError where it has taken more than `steps`; as Checkpointer.restore.
    """
    restored = restore_state(
        run,
        {
            name: abstract_state(parts[name].params, trainer.tx, mesh=run.mesh)
            for name, trainer in trainers.items()
        },
    )
    if restored is not None and restored.step > steps:
        raise ValueError(
            f"{run.out} has already taken {restored.step} steps, not just {steps}"
        )
    return restored


def train_and_report(
    run: Run,
    evaluations: Evaluations,
    *,
    state: Any,
    step_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    batches: Iterable[Any],
    steps: int,
    restored: Restored | None,
    names: Callable[[int], str],
    prompts: Sequence[PromptExample],
    save: Callable[[PyTree], Path],
    counts: Callable[[Any, float], dict[str, Any]],
    stored: Callable[[Any], tuple[PyTree, Mapping[str, float]]] = whole_state,
    flops_per_token: float = 0.0,
) -> dict[str, Any]:
    """Trains to the end, exports what is best, and writes the report.

    Args:
      run: with its inputs (run.identify).
      evaluations: of measure_start.
      state, step_fn, batches, steps, stored: as in loop.fit.
      restored: the checkpoint that the state is of; None for a fresh one.
      names: step -> where its rows come from.
      prompts: those of the texts that the evaluations have.
      save: exports the arrays of `stored`; returns where the model is.
      counts: (last state, tokens seen) -> what the summary says of them.
      flops_per_token: for `mfu`; 0 leaves it out.

    Returns: the summary.
    """
    meta = restored.meta if restored else {}
    guard = SkipGuard(meta.get("skipped", ()), names=names)
    writer = MetricsWriter(
        run.out,
        total_steps=steps,
        start_step=int(state.step),
        num_tokens=meta.get("num_tokens", 0.0),
        flops_per_token=flops_per_token,
        title=run.kind,
        on_step=run.callbacks.on_step,
    )
    try:
        state = fit(
            state,
            step_fn,
            batches,
            steps=steps,
            writer=writer,
            checkpointer=run.checkpointer,
            checkpoint_every=run.config.checkpoint_every,
            meta=run.meta,
            mesh=run.mesh,
            stop=run.stop,
            guard=guard,
            evaluations=evaluations,
            stored=stored,
        )
    finally:
        writer.close()
    run.clock.lap("train")
    last = int(state.step)
    tree, kept = kept_tree(run, evaluations, stored(state)[0], last)
    exported = save(tree)
    run.clock.lap("save model")
    summary = counts(state, writer.num_tokens) | guard.summary()
    summary |= evaluations.summary(last) | before_and_after(evaluations, kept)
    write_report(run, summary, prompts, evaluations, kept)
    return summary | {"model": str(exported)}


def before_and_after(evaluations: Evaluations, step: int) -> dict[str, float]:
    """eval_* figures of a step, and those that training has changed, before it."""
    before, after = evaluations.at(0).figures, evaluations.at(step).figures
    summary = {}
    for name, value in after.items():
        if before[name] != value:
            summary[f"eval_{name}_before"] = before[name]
        summary[f"eval_{name}"] = value
    return summary


def write_report(
    run: Run,
    summary: Mapping[str, Any],
    prompts: Sequence[PromptExample],
    evaluations: Evaluations,
    step: int,
) -> None:
    """OUT/report.html of a run, by process 0; what is wrong is said on the screen, too.

    Args:
      run: with what the time went for.
      summary: what came of it.
      prompts: of the sample texts; the first ones of each belong together.
      evaluations: of the run.
      step: whose parameters OUT/model has.
    """
    config, before, after = run.config, evaluations.at(0), evaluations.at(step)
    warnings = evaluations.warnings(step)
    for warning in warnings:
        _log.warning("%s", warning)
    if sharding.is_main_process():
        texts = zip(prompts, before.texts, after.texts, strict=False)
        report.write_report(
            config.out,
            title=f"{run.kind.upper()} of {Path(config.model).name}",
            config=as_text(config),
            samples=[dict(prompt=p.text, before=b, after=a) for p, b, a in texts],
            summary=summary,
            timings=run.clock.seconds,
            evaluations=evaluations.metrics_rows(),
            kept_step=step if config.keep_best else None,
            warnings=warnings,
        )
