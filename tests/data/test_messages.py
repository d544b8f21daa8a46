"""Tests for jalign/data/messages.py (more, through rows, in test_formats.py)."""

import pytest

from jalign.data.messages import kind_of, parse_messages, says_something
from jalign.data.rows import RowError
from tests.data.conftest import assistant, user


def test_known_forms_become_one():
    turns = [{"from": "human", "value": "a"}, {**assistant("b"), "tool_calls": None}]
    assert parse_messages(turns, "messages") == [user("a"), assistant("b")]


def test_roles_of_messages_are_not_guessed():
    with pytest.raises(RowError, match=r"messages\[0\].role.*'human'"):
        parse_messages([{"role": "human", "content": "a"}], "messages")


def test_says_something_and_kinds():
    assert says_something(user("a")) and not says_something(user(" \n"))
    assert says_something({"content": "", "tool_calls": [{"name": "f"}]})
    assert [kind_of(v) for v in ({}, [], "", True, 1)] == [
        "an object",
        "a list",
        "a string",
        "a boolean",
        "int",
    ]
