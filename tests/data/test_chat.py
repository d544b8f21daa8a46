"""Tests for jalign/data/chat.py."""

import numpy as np
import pytest

from jalign.data.chat import Chat, encode_chats, join_turns, render_prompt
from jalign.data.rows import RowError
from tests.data.conftest import assistant, make_tokenizer, user

TURNS = [user("ab"), assistant("cd"), user("ef"), assistant("gh")]


def encode(tokenizer, messages=TURNS, prompt=(), assistant_only=True):
    turns, first = join_turns(list(prompt), messages)
    chat = Chat(turns, list(prompt), first, {})
    (result,) = encode_chats(tokenizer, [chat], assistant_only=assistant_only)
    if isinstance(result, RowError):
        raise result
    ids, mask = result
    return tokenizer.decode(ids), tokenizer.decode(ids[mask])


def test_default_template_text_mask_and_export(tokenizer, tmp_path):
    text, trained = encode(tokenizer)
    want = "<s>User:\nab\n\nAssistant:\ncd</s>User:\nef\n\nAssistant:\ngh</s>"
    assert text == want
    assert trained == "cd</s>gh</s>"  # EOS is trained
    tokenizer.save_pretrained(tmp_path)  # the template goes along
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template


def test_default_template_refuses_tool_calls(tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    with pytest.raises(RowError, match="knows no tool calls"):
        encode(tokenizer, [user("ab"), call])


def test_prefix_differences_with_a_template_of_the_tokenizer(chatml):
    text, trained = encode(chatml)
    assert text.endswith("<|im_start|>assistant\ngh<|im_end|>\n")
    # Not the line break behind the EOS: sampling has stopped before it.
    assert trained == "cd<|im_end|>gh<|im_end|>"


def test_generation_marks_and_prefix_differences_agree(marked):
    by_marks = encode(marked)
    plain = make_tokenizer(
        chat_template=marked.chat_template.replace("{% generation %}", "").replace(
            "{% endgeneration %}", ""
        )
    )
    # The template marks the content only; the EOS behind it is trained all the same.
    assert by_marks == encode(plain)
    assert by_marks[1] == "cd</s>gh</s>"


@pytest.mark.parametrize("name", ["tokenizer", "chatml", "marked"])
def test_a_prompt_is_never_trained_and_is_what_sampling_sees(name, request):
    tokenizer = request.getfixturevalue(name)
    text, trained = encode(tokenizer, TURNS[1:2], prompt=TURNS[:1])
    prompt = render_prompt(tokenizer, TURNS[:1], {})
    assert trained == "cd" + tokenizer.eos_token
    assert text.rstrip() == prompt + trained


@pytest.mark.parametrize("name", ["tokenizer", "chatml", "marked"])
def test_a_prefilled_prompt_is_continued(name, request):
    tokenizer = request.getfixturevalue(name)
    prompt = [user("ab"), assistant("c")]
    text, trained = encode(tokenizer, [assistant("d")], prompt=prompt)
    assert trained == "d" + tokenizer.eos_token
    assert text.count("Assistant") + text.count("assistant") + text.count("A:") == 1


def test_a_prompt_that_ends_with_a_finished_assistant_turn(tokenizer):
    _, trained = encode(tokenizer, TURNS[2:], prompt=TURNS[:2])
    assert trained == "gh</s>"


def test_everything_behind_the_prompt(tokenizer):
    text, trained = encode(tokenizer, assistant_only=False)
    assert trained == text


def test_a_template_that_rewrites_earlier_turns_is_refused():
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{{ eos_token }}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(RowError, match="rewrites the first 1 turns"):
        encode(tokenizer)


def test_a_template_that_writes_the_last_turn_differently_is_read_up_to_eos():
    template = (  # as Qwen3's: only the last answer has a block of thoughts
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:' }}"
        "{% if loop.last %}{{ '[]' }}{% endif %}{{ m['content'] + eos_token }}"
        "{% else %}{{ 'U:' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    assert encode(tokenizer)[1] == "cd</s>[]gh</s>"


def test_the_templates_own_complaint_is_kept():
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(RowError, match="roles must alternate"):
        encode(tokenizer)


def test_a_conversation_cannot_start_with_the_assistant(tokenizer):
    with pytest.raises(RowError, match="starts with an assistant turn"):
        encode(tokenizer, TURNS[1:])


def test_trap56_templated_text_gets_no_second_bos(marked):
    (result,) = encode_chats(marked, [Chat(TURNS, [], 0, {})], assistant_only=True)
    assert not isinstance(result, RowError)
    ids, mask = result
    assert np.sum(ids == marked.bos_token_id) == 1
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_chunks_do_not_change_the_result(tokenizer, monkeypatch):
    chats = [Chat([user("a" * i), assistant("b")], [], 0, {}) for i in range(1, 6)]
    whole = encode_chats(tokenizer, chats, assistant_only=True)
    monkeypatch.setattr("jalign.data.chat.CHUNK", 2)
    parts = encode_chats(tokenizer, chats, assistant_only=True)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a[0], b[0])  # pyright: ignore
        np.testing.assert_array_equal(a[1], b[1])  # pyright: ignore
