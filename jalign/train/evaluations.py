"""Held-out figures while a run trains: what is best, what is kept, when to stop.

A reward model is an estimate, so a policy that goes on following it ends worse by any
other measure (Gao et al. 2022, arXiv:2210.10760). What is measured here is written into
the metrics, stored with every checkpoint, and drawn in the report.
"""

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from jalign.train.config import RunConfig
from jalign.types import PyTree

_log = logging.getLogger("jalign.train")
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "log_loss"})
_FELL = 0.1  # of what a figure had gained: less is taken for noise


class Callbacks(NamedTuple):
    """What a run calls as it goes, on every process.

    Attributes:
      on_step: (steps taken, that step's row of metrics.jsonl), a step late, so that no
        device waits.
      on_eval: (step, held-out figures), before, during and after training.
    """

    on_step: Callable[[int, dict[str, Any]], None] | None = None
    on_eval: Callable[[int, dict[str, float]], None] | None = None


NO_CALLBACKS = Callbacks()


class Evaluation(NamedTuple):
    """What a model does on held-out rows.

    Attributes:
      figures: name -> value; none without such rows.
      texts: its first completions, for the report.
    """

    figures: dict[str, float]
    texts: list[str]


class Evaluations:
    """What was measured before, during and after training.

    Args:
      look: parameters -> Evaluation.
      config: the run's: eval_every, keep_best, patience, stop_kl.
      digest: of all that the figures depend on beside the weights.
      record: what a checkpoint of the run stored (`record`); figures of another digest
        are not comparable, and left behind.
      on_eval: called with (step, figures) after each measurement.
    """

    def __init__(
        self,
        look: Callable[[PyTree], Evaluation],
        config: RunConfig,
        *,
        digest: str = "",
        record: Mapping[str, Any] | None = None,
        on_eval: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self._look, self._config, self._digest = look, config, digest
        self._on_eval = on_eval
        self._rows: list[dict[str, Any]] = []
        record = record or {}
        self.ended: str | None = record.get("ended")  # why a run that is over is so
        self._beyond: bool = record.get("beyond", False)
        found = record.get("evaluations")
        if found and found["digest"] == digest:
            self._rows = [dict(row) for row in found["rows"]]
        elif found:
            _log.warning("held-out rows have changed: what is best counts anew")

    def measure(self, step: int, params: PyTree) -> dict[str, float]:
        """Takes the figures of a step, if they are not known yet.

        Returns: them, `eval_` before their names, to be written; {} if they were known
          or eval_every is unset (then before and after are in the summary).
        """
        if step in (row["step"] for row in self._rows):
            return {}
        figures, texts = self._look(params)
        metric = self._config.keep_best
        if metric and metric not in figures:
            raise ValueError(
                f"keep_best {metric!r} is not measured on the held-out rows; there "
                f"are {', '.join(figures) or 'no such rows'}"
            )
        row = {"step": step, "figures": figures, "texts": texts}
        self._rows = sorted([*self._rows, row], key=lambda row: row["step"])
        for row in self._rows[1:-1]:
            if row["step"] != self.kept:
                row["texts"] = []
        if figures and step:
            name = self._config.watched
            best = " (best so far)" if self.kept == step else ""
            _log.info("step %d: held-out %s %.4g%s", step, name, figures[name], best)
        if figures and self._on_eval:
            self._on_eval(step, dict(figures))
        written = figures if self._config.eval_every else {}
        return {f"eval_{name}": value for name, value in written.items()}

    def rollout(self, step: int, kl: float) -> None:
        """Ends the run where two rollouts in a row are beyond stop_kl.

        What is beyond is not learned from, so that the second is of the same policy:
        one mean of few completions may be beyond by chance, or by one of them.

        Args:
          step: the iteration.
          kl: nats a completion from the reference, of its rollout.
        """
        limit = getattr(self._config, "stop_kl", None)
        before, self._beyond = self._beyond, limit is not None and kl > limit
        if not self._beyond:
            return
        said = f"{kl:.4g} nats from the reference, beyond stop_kl {limit:g}"
        _log.warning("iteration %d: its rollout is %s: not learned from", step, said)
        if before:
            self.ended = f"two rollouts in a row are beyond: the policy is {said}"

    def due(self, step: int) -> bool:
        """Whether to measure after so many steps."""
        every = self._config.eval_every
        return bool(every) and step % every == 0

    @property
    def kept(self) -> int | None:
        """The step whose checkpoint is best by keep_best, the first of equals; None
        without keep_best, or where each is beyond stop_kl."""
        metric = self._config.keep_best
        if metric is None:
            return None
        limit = getattr(self._config, "stop_kl", None)
        rows = [
            row
            for row in self._rows
            if row["step"] and (limit is None or row["figures"]["kl"] <= limit)
        ]
        key = _sign(metric)
        best = max(rows, key=lambda row: key * row["figures"][metric], default=None)
        return None if best is None else best["step"]

    @property
    def over(self) -> str | None:
        """Why training ends here: `ended`, or patience is at its end."""
        patience, kept = self._config.patience, self.kept
        if self.ended or patience is None:
            return self.ended
        later = [row for row in self._rows if row["step"] > (kept or 0)]
        if len(later) < patience:
            return None
        return f"no better held-out {self._config.keep_best} in {patience} measurements"

    def record(self) -> dict[str, Any]:
        """To store with a checkpoint."""
        found = {"digest": self._digest, "rows": self._rows}
        return {"evaluations": found, "ended": self.ended, "beyond": self._beyond}

    def summary(self, last: int) -> dict[str, Any]:
        """What a run that ended after step `last` tells of its guards."""
        found: dict[str, Any] = {}
        if self._config.keep_best:
            found["kept_step"] = self.kept or last
        if self.over:
            found["ended_early"] = self.over
        return found

    def at(self, step: int) -> Evaluation:
        """What was measured at a step; nothing if it was not."""
        for row in self._rows:
            if row["step"] == step:
                return Evaluation(row["figures"], row["texts"])
        return Evaluation({}, [])

    def metrics_rows(self) -> list[dict[str, float]]:
        """{"step": ..., "eval_...": ...} of each measurement."""
        return [
            {"step": row["step"]}
            | {f"eval_{name}": value for name, value in row["figures"].items()}
            for row in self._rows
        ]

    def warnings(self, step: int) -> list[str]:
        """What is wrong with the model of this step, by its held-out figures."""
        before, after = self.at(0).figures, self.at(step).figures
        name = self._config.watched
        if name not in before or name not in after:
            return []
        found = []
        if self._config.keep_best and self.kept is None:
            found.append(
                "every measurement was beyond --stop-kl: OUT/model is the last policy"
            )
        if _sign(name) * (after[name] - before[name]) < 0:
            found.append(
                f"ended worse than it began: held-out {name} {before[name]:.4g} -> "
                f"{after[name]:.4g}{self._advice(step)}"
            )
        return found + self._over_optimized(step)

    def _advice(self, step: int) -> str:
        """Where it was best, unless that is what is kept."""
        if self._config.keep_best:
            return "; no measurement was better"
        name = self._config.watched
        key = lambda row: _sign(name) * row["figures"][name]  # noqa: E731
        best = max(self._rows, key=key)["step"]
        if best in (0, step):
            return ""
        return f"; it was best at step {best}, which --keep-best {name} keeps"

    def _over_optimized(self, step: int) -> list[str]:
        """The reward that was followed rose while the one that was not fell."""
        gold, proxy = "gold_reward", "reward"
        rows = [row for row in self._rows if gold in row["figures"]]
        if not rows:
            return []
        best = max(rows, key=lambda row: row["figures"][gold])
        then, now = best["figures"], self.at(step).figures
        lost = then[gold] - now[gold]
        gained = then[gold] - rows[0]["figures"][gold]
        if lost <= _FELL * gained or now[proxy] <= then[proxy]:
            return []
        return [
            f"the reward is over-optimized: from step {best['step']} to {step} it rose "
            f"from {then[proxy]:.4g} to {now[proxy]:.4g}, and --eval-reward fell from "
            f"{then[gold]:.4g} to {now[gold]:.4g}; try --keep-best gold_reward, "
            "--stop-kl, or a larger KL coefficient"
        ]


def unmeasured() -> Evaluations:
    """Of a loop that has nothing to measure."""
    config: Any = SimpleNamespace(eval_every=None, keep_best=None, patience=None)
    return Evaluations(lambda _: Evaluation({}, []), config)


def _sign(metric: str) -> int:
    return -1 if metric in LOWER_IS_BETTER else 1
