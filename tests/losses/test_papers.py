"""docs/papers.md and the losses: each has its row, and the rows name what is there."""

import inspect
import re
from pathlib import Path

import pytest

from jalign import losses
from jalign.train.loss_table import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
SOURCES, *SECTIONS = TEXT.split("\n## ")
(COMMANDS,) = (x for x in SECTIONS if x.startswith("On the command line"))


def rows(text):
    """The cells of each row of a text's tables, their heads left out."""
    lines = [line[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [list(map(str.strip, line.split("|"))) for line in lines]


def in_code(cell):
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", cell))))


def test_every_loss_with_a_source_has_a_row_and_every_row_a_loss():
    named = set().union(*(in_code(row[0]) for row in rows(SOURCES)))
    assert named <= set(losses.__all__)
    functions = {name: getattr(losses, name) for name in losses.__all__}
    sourced = {n for n, f in functions.items() if "Source:" in inspect.getdoc(f)}
    assert sourced <= named


def test_the_tests_that_hold_them_are_there():
    named = set(re.findall(r"test_\w+\.py", TEXT))
    assert len(named) > 20
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("command", REGISTRY)
def test_every_name_of_the_command_line_stands_in_its_table(command):
    said, at = set(), ""
    for first, names, _ in rows(COMMANDS):
        at = first.strip("`") or at
        if at == command:
            said |= in_code(names)
    assert set(REGISTRY[command]) <= said
    assert said <= set(REGISTRY[command]) | set(losses.__all__)
