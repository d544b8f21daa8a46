"""Tests for jalign/data/messages.py (more, through rows, in test_formats.py)."""

import pytest

from jalign import data
from jalign.data.messages import kind_of, parse_messages, says_something
from jalign.data.rows import RowError
from tests.data.conftest import assistant, make_tokenizer, user


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


TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' ~ m['role'] ~ '\n' }}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] ~ c['function']['arguments'] | tojson }}{% endfor %}"
    "{{ m['content'] ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def call_row(name, properties, arguments):
    function = {"name": name, "arguments": arguments}
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": function}],
    }
    parameters = {"type": "object", "properties": properties}
    schema = {"type": "function", "function": {"name": name, "parameters": parameters}}
    return {"messages": [user("go"), call], "tools": [schema]}


def test_nulls_of_arrow_are_stripped_at_every_depth(tmp_path, write_jsonl):
    """JSONL, Parquet and save_to_disk give the same tokens."""
    import datasets

    tokenizer = make_tokenizer(bos=False, eos="<|im_end|>", chat_template=TOOLS)
    kind = {"type": "string", "enum": ["Rome", None]}  # an element of a list stays
    rows = [
        call_row("weather", {"city": kind}, {"at": [{"day": 1}], "city": "Rome"}),
        call_row("add", {"a": {"type": "number"}}, {"at": [{"hour": 2}], "a": 1}),
    ]
    stored = datasets.Dataset.from_list(rows)
    assert stored[0]["tools"][0]["function"]["parameters"]["properties"]["a"] is None
    stored.to_parquet(tmp_path / "rows.parquet")
    stored.save_to_disk(tmp_path / "saved")

    def read(source):
        examples, _ = data.sft_examples(
            data.load_rows(source), tokenizer, max_length=999
        )
        return [e.tokens.tolist() for e in examples]

    want = read(write_jsonl(rows))
    assert '{"at": [{"day": 1}], "city": "Rome"}' in tokenizer.decode(want[0])
    assert '"enum": ["Rome", null]' in tokenizer.decode(want[0])
    assert "null" not in tokenizer.decode(want[1])
    assert read(tmp_path / "rows.parquet") == read(tmp_path / "saved") == want


def test_arguments_in_a_string_are_decoded_once_and_keep_their_nulls():
    tokenizer = make_tokenizer(bos=False, eos="<|im_end|>", chat_template=TOOLS)

    def texts(arguments):
        row = call_row("f", {}, arguments)
        (example,), _ = data.sft_examples([row], tokenizer, max_length=999)
        return tokenizer.decode(example.tokens[example.completion_mask])

    assert texts('{"a": "1"}') == texts({"a": "1"}) == 'f{"a": "1"}<|im_end|>'
    assert texts('{"a": null}') == 'f{"a": null}<|im_end|>'
    for wrong, words in (
        ("{'a': 1}", "broken JSON"),
        ('"{}"', "encode it once"),
        ("[1]", "is a list, not an object"),
    ):
        with pytest.raises(
            ValueError, match=r"tool_calls\[0\].function.arguments"
        ) as e:
            texts(wrong)
        assert words in str(e.value)
