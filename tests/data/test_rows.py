"""Tests for jalign/data/rows.py."""

import pytest

from jalign.data.rows import BadRow, RowError, Rows, parse_rows, settle, sort_out


def parse(row):
    if row["n"] is None:
        raise RowError("n", "missing or null")
    return row["n"]


def test_every_row_is_parsed_on_its_own_and_unread_rows_are_kept():
    rows = Rows([{"n": 1}, {"n": None}], bad=[BadRow("f row 9", "(line)", "broken")])
    good, bad = sort_out(rows, parse_rows(rows, parse))
    assert good == [1]
    assert [b.origin for b in bad] == ["f row 9", "row 2"]


def test_what_is_not_an_object_is_named():
    rows = ["text"]
    _, bad = sort_out(rows, parse_rows(rows, parse))  # pyright: ignore
    assert bad == [BadRow("row 1", "(row)", "is str, not an object")]


def test_report_names_counts_rows_fields_and_reasons():
    bad = [BadRow(f"row {i}", f"m[{i}]", "empty") for i in range(4)]
    with pytest.raises(ValueError) as error:
        settle(bad, 8, "error")
    text = str(error.value)
    assert "4 of 8 rows are unusable (4 x m[N]: empty)" in text
    assert "row 0, field 'm[0]': empty" in text and "and 1 more" in text
    assert settle(bad, 8, "skip") == {"bad_rows": 4, "bad_rows/m[N]: empty": 4}


def test_skipping_everything_no_rows_and_bad_modes_are_errors():
    with pytest.raises(ValueError, match="No row is usable"):
        settle([BadRow("row 1", "n", "empty")], 1, "skip")
    with pytest.raises(ValueError, match="no rows"):
        settle([], 0, "skip")
    with pytest.raises(ValueError, match="bad_rows must be"):
        settle([], 1, "ignore")
