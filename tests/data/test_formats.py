"""Tests for jalign/data/formats.py."""

import pytest

from jalign.data.formats import (
    Exchange,
    extract_prompt,
    parse_preference,
    parse_prompt,
    parse_sft,
)
from jalign.data.rows import RowError
from tests.data.conftest import assistant, user

HI, YO, NO = user("hi"), assistant("yo"), assistant("no")


def test_sft_formats():
    assert parse_sft({"text": "a"}) == Exchange(None, "a", {})
    assert parse_sft({"messages": [HI, YO]}) == Exchange(None, [HI, YO], {})
    assert parse_sft({"prompt": "a", "completion": "b"}) == Exchange("a", "b", {})
    row = {"prompt": [HI], "completion": [YO]}
    assert parse_sft(row) == Exchange([HI], [YO], {})
    # Null columns, as `datasets` unites them over mixed files, are absent.
    row = {"messages": None, "prompt": None, "completion": None, "text": "a"}
    assert parse_sft(row).completion == "a"


def test_sharegpt_conversations():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yo", "weight": None},
    ]
    want = [{"role": "system", "content": "s"}, HI, YO]
    assert parse_sft({"conversations": turns}).completion == want


def test_typed_text_parts_template_args_and_tool_calls():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    row = {
        "messages": [{"role": "user", "content": parts}, call],
        "tools": '[{"name": "f"}]',
        "chat_template_kwargs": {"thinking": False},
    }
    exchange = parse_sft(row)
    assert exchange.completion[0] == HI and exchange.completion[1]["content"] == ""
    assert exchange.template_args == {"thinking": False, "tools": [{"name": "f"}]}


def test_preference_formats():
    got = parse_preference({"prompt": "a", "chosen": "b", "rejected": "c"})
    assert got[:4] == ("a", "b", "c", 0.0)
    row = {"prompt": [HI], "chosen": [YO], "rejected": [NO], "margin": 2}
    assert parse_preference(row)[:4] == ([HI], [YO], [NO], 2.0)
    row = {"chosen": [HI, YO], "rejected": [HI, NO]}
    assert parse_preference(row)[:3] == ([HI], [YO], [NO])
    # UltraFeedback: a string prompt beside whole conversations.
    assert parse_preference({**row, "prompt": "hi"})[:3] == ([HI], [YO], [NO])


@pytest.mark.parametrize(
    "chosen, rejected, want",
    [
        ("is it? yes", "is it? no", ("is it?", " yes", " no")),
        # Neither inside a word ...
        ("The sky is blue", "The sky is black", ("The sky is", " blue", " black")),
        # ... nor with an empty completion, where one text starts the other.
        ("a b", "a b c", ("a", " b", " b c")),
    ],
)
def test_implicit_prompt_of_strings(chosen, rejected, want):
    assert extract_prompt(chosen, rejected) == want


def test_implicit_prompt_of_conversations_leaves_each_side_a_turn():
    longer = [HI, YO, user("more"), NO]
    assert extract_prompt(longer, [HI, YO]) == ([HI], longer[1:], [YO])


def test_prompt_formats():
    assert parse_prompt({"prompt": "a", "answer": 3}).prompt == "a"
    assert parse_prompt({"prompt": [HI]}).prompt == [HI]
    assert parse_prompt({"messages": [HI, YO]}).prompt == [HI]


BAD = [
    (parse_sft, {"text": None}, "text", "missing or null"),
    (parse_sft, {}, "(row)", "has the fields none"),
    (parse_sft, {"other": 1}, "(row)", "has the fields other; expected messages"),
    (parse_sft, {"text": 3}, "text", "is int, not a string"),
    (parse_sft, {"text": {"a": 1}}, "text", "is an object"),
    (parse_sft, {"text": " "}, "text", "empty"),
    (parse_sft, {"text": "\ud800"}, "text", "lone surrogate"),
    (parse_sft, {"prompt": "a", "completion": ""}, "completion", "empty"),
    (parse_sft, {"prompt": "", "completion": ""}, "completion", "empty"),
    (parse_sft, {"prompt": "a", "completion": None}, "completion", "missing or null"),
    (parse_sft, {"prompt": None, "completion": "a"}, "prompt", "missing or null"),
    (parse_sft, {"prompt": "a", "completion": [YO]}, "completion", "mixes"),
    (parse_sft, {"prompt": ["a"], "completion": "b"}, "prompt[0]", "is a string"),
    (parse_sft, {"messages": []}, "messages", "empty list"),
    (parse_sft, {"messages": "a"}, "messages", "is a string"),
    (parse_sft, {"messages": [HI]}, "messages", "no assistant turn"),
    (parse_sft, {"messages": [HI, assistant("")]}, "messages[1].content", "empty"),
    (parse_sft, {"messages": [{"role": "x"}]}, "messages[0].role", "is 'x', not one"),
    (parse_sft, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (parse_sft, {"messages": [user([{"type": "image"}])]}, "messages[0].content", "pa"),
    (parse_sft, {"conversations": [{"from": "x"}]}, "conversations[0].from", "unknown"),
    (parse_sft, {"text": "a", "tools": "{"}, "tools", "broken JSON"),
    (parse_preference, {"prompt": "a"}, "(row)", "expected chosen + rejected"),
    (parse_preference, {"prompt": "a", "chosen": "b"}, "rejected", "missing or null"),
    (parse_preference, {"chosen": None, "rejected": "b"}, "chosen", "missing or null"),
    (parse_preference, {"chosen": "a b", "rejected": "a b"}, "rejected", "equals"),
    (parse_preference, {"chosen": "blue ", "rejected": "red"}, "prompt", "missing"),
    (parse_preference, {"chosen": [HI], "rejected": [HI]}, "chosen", "no assistant"),
    (parse_preference, {"chosen": [YO], "rejected": [NO]}, "prompt", "missing"),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": ""},
        "rejected",
        "em",
    ),
    (parse_preference, {"prompt": None, "chosen": "b", "rejected": "c"}, "prompt", "m"),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"},
        "margin",
        "is a string, not a number",
    ),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
        "margin",
        "not finite",
    ),
    (
        parse_preference,
        {"prompt": [HI], "chosen": [HI, YO], "rejected": [HI, NO]},
        "chosen",
        "repeats the turns of prompt",
    ),
    (
        parse_preference,
        {"prompt": "other", "chosen": [HI, YO], "rejected": [HI, NO]},
        "prompt",
        "is no turn",
    ),
    (parse_prompt, {"text": "a"}, "(row)", "expected prompt"),
    (parse_prompt, {"prompt": 7}, "prompt", "is int"),
    (parse_prompt, {"messages": [YO]}, "messages", "no turn before"),
]


@pytest.mark.parametrize("parse, row, field, reason", BAD, ids=range(len(BAD)))
def test_bad_rows_name_the_field_and_the_reason(parse, row, field, reason):
    with pytest.raises(RowError) as error:
        parse(row)
    assert error.value.field == field
    assert reason in error.value.reason
