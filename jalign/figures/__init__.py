"""Figures of a report: from rows of metrics to drawings with a word on each."""

from typing import NamedTuple

from jalign.figures.curves import (
    OVER_KL,
    Figure,
    Rows,
    curves_of,
    merge_related,
    only_value,
    repetitions,
    reward_over_kl,
)
from jalign.figures.drawing import draw
from jalign.figures.notes import NOTES, note_of

__all__ = ["OVER_KL", "Figure", "Figures", "figures_of"]


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
