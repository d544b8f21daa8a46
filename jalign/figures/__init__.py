"""Figures of a report: from rows of metrics to drawings with a word on each."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jalign.figures.drawing import OVER_KL, Curve, Figure, draw
from jalign.figures.notes import NOTES, note_of

__all__ = ["OVER_KL", "Figure", "Figures", "figures_of"]

Rows = Iterable[Mapping[str, Any]]
# Not figures: where a row stands, not what was measured there.
AXES = {"step", "epoch", "time", "phase", "episode"}
# Held-out figure -> the training figures that measure the same, under other names; the
# first one there is takes its line. Counts of held-out rows have none.
PARTNERS = {
    "loss": ("nll", "loss"),
    "accuracy": ("accuracy", "rewards/accuracies"),
    "margin": ("margin", "rewards/margins"),
    "kl": ("objective/kl",),  # nats a completion; GRPO's `kl` is nats a token
    "completion_length": ("completions/mean_length",),
    "num_tokens": (),
}
ROUNDING = 1e-5  # relative; float32 sums of one thing in two orders are as close


class Figures(NamedTuple):
    """What a run's metrics come to.

    Attributes:
      drawn: in the order of the notes.
      still: metrics that never moved -> their value.
      repeated: metrics left out -> the one that has the same curve.
    """

    drawn: list[Figure]
    still: dict[str, float]
    repeated: dict[str, str]


def figures_of(rows: Rows, kept_step: int | None = None) -> Figures:
    """Every metric of the rows, drawn once and only where it moves.

    Args:
      rows: of metrics, one a step; names that begin with eval_ are held-out figures.
      kept_step: is marked in the figures with a held-out line.
    """
    curves = curves_of(rows)
    over_kl = reward_over_kl(curves, kept_step)
    repeated = repetitions(curves)
    curves = {name: curve for name, curve in curves.items() if name not in repeated}
    drawn, still = [], {}
    for figure in merge_related(curves):
        if (value := only_value(figure)) is not None:
            still[figure.name] = value
        else:
            drawn.append(figure)
    drawn = [finish(figure, kept_step) for figure in over_kl + drawn]
    drawn.sort(key=lambda figure: NOTES.index(note_of(figure.name)))
    return Figures(drawn, still, repeated)


def finish(figure: Figure, kept_step: int | None) -> Figure:
    """With its group, its note and its drawing."""
    note = note_of(figure.name)
    svg = draw(figure, kept_step)
    return figure._replace(group=note.group, note=note.sentence, svg=svg)


def curves_of(rows: Rows) -> dict[str, Curve]:
    """Metric name -> (steps, values), without the values that are not finite; what was
    measured in training comes first."""
    curves: dict[str, Curve] = {}
    for index, row in enumerate(rows):
        for name, value in row.items():
            if name in AXES or isinstance(value, bool):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row.get("step", index)))
                values.append(float(value))
    return dict(sorted(curves.items(), key=lambda item: item[0].startswith("eval_")))


def repetitions(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Metric of training -> an earlier one with the same curve; plain names come
    before a/b."""
    kept: dict[str, Curve] = {}
    found = {}
    trained = [name for name in curves if not name.startswith("eval_")]
    for name in sorted(trained, key=lambda name: "/" in name):
        same = (k for k, curve in kept.items() if is_same(curve, curves[name]))
        if (twin := next(same, None)) is None:
            kept[name] = curves[name]
        else:
            found[name] = twin
    return found


def is_same(a: Curve, b: Curve) -> bool:
    """True where two curves that move are equal, up to rounding."""
    if a[0] != b[0] or not moves(a[1]):
        return False
    far = max(abs(x - y) for x, y in zip(a[1], b[1], strict=True))
    return far <= ROUNDING * max(map(abs, a[1]))


def moves(values: Sequence[float]) -> bool:
    """True where the values differ by more than rounding."""
    return max(values) - min(values) > ROUNDING * max(map(abs, values))


def only_value(figure: Figure) -> float | None:
    """The one value of all lines; None where it moves or was measured only once."""
    values = [value for curve in figure.curves.values() for value in curve[1]]
    often = any(len(curve[1]) > 1 for curve in figure.curves.values())
    return values[-1] if often and not moves(values) else None


def merge_related(curves: Mapping[str, Curve]) -> list[Figure]:
    """A held-out curve joins its training figure; `x/chosen` and `x/rejected` share
    `x`, too."""
    figures: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        base = name.removeprefix("eval_")
        head, _, tail = base.rpartition("/")
        if tail in {"chosen", "rejected"}:
            label = tail if base == name else f"held-out {tail}"
            figures.setdefault(head, {})[label] = curve
        elif base == name:
            figures[name] = {"train": curve}
        else:
            options = PARTNERS.get(base, (base, f"{base}/mean"))
            partner = next((x for x in options if x in figures), name)
            figures.setdefault(partner, {})["held-out"] = curve
    return [Figure(name, lines) for name, lines in figures.items()]


def reward_over_kl(curves: Mapping[str, Curve], kept_step: int | None) -> list[Figure]:
    """The figure of rewards over the KL to the reference, where there are both.

    In training the KL is PPO's `objective/kl`, or GRPO's mean over tokens times the
    mean length; on held-out prompts `eval_kl`. All in nats a completion.
    """
    token_kl = values_by_step(curves, "kl")
    length = values_by_step(curves, "completions/mean_length")
    train_kl = values_by_step(curves, "objective/kl") or {
        step: kl * length[step] for step, kl in token_kl.items() if step in length
    }
    held_out_kl = values_by_step(curves, "eval_kl")
    lines, kept = {}, ([], [])
    for label, name, kl in (
        ("while training", "reward", train_kl),
        ("held-out", "eval_reward", held_out_kl),
        ("held-out, gold", "eval_gold_reward", held_out_kl),
    ):
        reward = values_by_step(curves, name)
        steps = [step for step in reward if step in kl]
        if len(steps) > 1:
            lines[label] = ([kl[s] for s in steps], [reward[s] for s in steps])
            if kl is held_out_kl and kept_step in steps:
                kept[0].append(kl[kept_step])
                kept[1].append(reward[kept_step])
    return [Figure(OVER_KL, lines, kept=kept)] if lines else []


def values_by_step(curves: Mapping[str, Curve], name: str) -> dict[float, float]:
    """Step -> value of a curve; {} if there is none."""
    return dict(zip(*curves.get(name, ((), ())), strict=True))
