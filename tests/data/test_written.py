"""Tests for jalign/data/chat.py: what a chat template passes over is refused."""

import pytest

from jalign import data
from jalign.data import chat as written
from tests.data.conftest import CHATML, assistant, make_tokenizer, user

_TURN = "'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
ZEPHYR = (  # writes the roles that it knows
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ " + _TURN + " }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DROPS_SYSTEM = ZEPHYR.replace("'system', ", "")
NAMES_ONLY = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }}{% endfor %}",
)
TOOLS = (  # as Qwen2.5's: tools in the system's turn, results trimmed, as the user's
    "{% set first = messages[0] %}{{ '<|im_start|>system\\n' }}"
    "{% if first['role'] == 'system' %}{{ first['content'] }}{% endif %}"
    "{% for tool in tools or [] %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>' ~ (m['content'] | trim | tojson) "
    "~ '</tool_response><|im_end|>\\n' }}{% elif m['role'] != 'system' %}"
    "{{ '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'].split('</think>')[-1] }}"
    "{% for c in m['tool_calls'] or [] %}{% set f = c['function'] or c %}"
    "{{ '<tool_call>{\"name\": \"' ~ f['name'] ~ '\", \"arguments\": ' "
    "~ (f['arguments'] | tojson) ~ '}</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {}}}
CALL = {
    **assistant(""),
    "tool_calls": [{"function": {"name": "warmth", "arguments": {"city": "Rome"}}}],
}
# The answer says the result again: looking for its text would find that.
RESULT = [{"role": "tool", "content": ' "18" \n'}, assistant('It is "18" now.')]
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = user("How warm is it?")
THOUGHT = [ASKED, assistant("<think>no</think>Yes"), ASKED, assistant("b")]


def examples(template, row):
    tokenizer = make_tokenizer(bos=False, eos="<|im_end|>", chat_template=template)
    found, _ = data.sft_examples([row], tokenizer, max_length=999)
    return tokenizer.decode(found[0].tokens)


def prompts(template, row):
    tokenizer = make_tokenizer(bos=False, eos="<|im_end|>", chat_template=template)
    turns = [*row["messages"], ASKED]  # so that all is in the prompt
    found, _ = data.prompt_examples(
        [{**row, "messages": turns}], tokenizer, max_prompt_length=999
    )
    return found[0].text


REFUSED = {
    "call": (CHATML, [ASKED, CALL], "[1]': the chat template does not write the name"),
    "arguments": (NAMES_ONLY, [ASKED, CALL], "[1]': the chat template does not write"),
    "result": (
        ZEPHYR,
        [ASKED, assistant("b"), *RESULT],
        "[2]': the chat template does",
    ),
    "developer": (
        ZEPHYR,
        [{**SYSTEM, "role": "developer"}, ASKED, assistant("b")],
        "[0]': the chat template does not write the developer's turn",
    ),
    "system": (
        DROPS_SYSTEM,
        [SYSTEM, ASKED, assistant("b")],
        "[0]': the chat template does not write the system's turn",
    ),
}


@pytest.mark.parametrize("make", [examples, prompts])
@pytest.mark.parametrize("name", REFUSED)
def test_a_turn_that_the_template_passes_over_is_refused(name, make):
    template, turns, words = REFUSED[name]
    with pytest.raises(ValueError, match="1 of 1 rows are unusable") as error:
        make(template, {"messages": turns})
    assert f"'messages{words}" in str(error.value)


@pytest.mark.parametrize("make", [examples, prompts])
def test_tools_that_the_template_passes_over_are_refused(make):
    with pytest.raises(ValueError, match="'tools': the chat template writes none"):
        make(CHATML, {"messages": [ASKED, assistant("b")], "tools": [TOOL]})


@pytest.mark.parametrize("make", [examples, prompts])
def test_what_a_template_writes_in_its_own_way_is_taken(make):
    turns = [SYSTEM, ASKED, CALL, *RESULT]
    text = make(TOOLS, {"messages": turns, "tools": [TOOL]})
    assert "Be brief." in text and '\\"18\\"' in text and '{"city": "Rome"}' in text
    assert "jalign" not in text
    assert "no</think>" not in make(TOOLS, {"messages": THOUGHT})
    empty = {**SYSTEM, "content": " "}
    assert make(DROPS_SYSTEM, {"messages": [empty, ASKED, assistant("b")]})


def test_each_shape_of_a_conversation_is_looked_at_once(monkeypatch):
    calls = []
    real = written._unwritten
    monkeypatch.setattr(
        written, "_unwritten", lambda *args: calls.append(args) or real(*args)
    )
    tokenizer = make_tokenizer(bos=False, eos="<|im_end|>", chat_template=CHATML)
    rows = [{"messages": [SYSTEM, user(text), assistant("b")]} for text in "abc"]
    plain = {"messages": [ASKED, assistant("b")]}  # nothing of it can be passed over
    data.sft_examples([*rows, plain], tokenizer, max_length=99)
    assert len(calls) == 1
    data.sft_examples(
        [{"messages": [SYSTEM, *THOUGHT]}, *rows], tokenizer, max_length=999
    )
    assert len(calls) == 3


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages | nothing }}"])
def test_a_template_that_cannot_be_compiled_is_named_not_the_data(template, tmp_path):
    make_tokenizer(chat_template=template).save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(tmp_path)
    for make in (data.sft_examples, data.prompt_examples):
        limit = "max_length" if make is data.sft_examples else "max_prompt_length"
        with pytest.raises(ValueError, match="cannot be compiled: line 1") as error:
            make([{"messages": [ASKED, assistant("b")]}], tokenizer, **{limit: 99})
        assert str(tmp_path) in str(error.value) and "rows" not in str(error.value)
