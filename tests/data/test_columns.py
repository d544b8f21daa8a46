"""Tests for jalign/data/columns.py."""

import pytest

from jalign import data

PAIR = {"good": "a", "bad": "b"}


def test_columns_are_a_text_or_a_mapping():
    want = {"prompt": ("question",), "ignore": ("label", "id")}
    text = "prompt=question, ignore=label,ignore=id"
    assert data.parse_columns(text) == want
    mapping = {"prompt": "question", "ignore": ["label", "id"]}
    assert data.parse_columns(mapping) == want
    assert data.parse_columns(None) == data.parse_columns("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", "expected NAME=COLUMN"),
        ("promt=question", "nothing reads 'promt'; did you mean 'prompt'"),
        ("prompt=a,prompt=b", "'prompt' is given twice"),
    ],
)
def test_columns_that_mean_nothing_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        data.parse_columns(text)


def test_pairs_are_known_under_any_name():
    assert data.are_pairs([{"chosen": "a", "rejected": "b"}], None)
    assert data.are_pairs([PAIR], "chosen=good,rejected=bad")
    assert not data.are_pairs([PAIR], None)
    assert not data.are_pairs([{"prompt": "a", "completion": "b"}], None)
