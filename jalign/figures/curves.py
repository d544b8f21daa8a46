"""From rows of metrics to the lines of figures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Rows = Iterable[Mapping[str, Any]]
Curve = tuple[list[float], list[float]]
"""Positions and values of the same length, in the order of the steps."""

OVER_KL = "reward over KL"
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


class Figure(NamedTuple):
    """A figure of the page.

    Attributes:
      name: of the metric; OVER_KL for the one whose horizontal axis is the KL.
      curves: lines by label.
      group, note: where it is shown, and how to read it.
      svg: the finished drawing.
      kept: the points of the step whose weights were kept, in the one over KL.
    """

    name: str
    curves: dict[str, Curve]
    group: str = ""
    note: str = ""
    svg: str = ""
    kept: Curve = ([], [])


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
