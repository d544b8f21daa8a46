"""Tests for jalign/data/chat.py."""

import numpy as np
import pytest

from jalign import data
from jalign.data.chat import Chat, encode_chats, join_turns
from jalign.data.rows import RowError
from jalign.data.templates import render_prompt
from tests.data.conftest import assistant, make_tokenizer, trained, user

TURNS = [user("ab"), assistant("cd"), user("ef"), assistant("gh")]


def encode(tokenizer, messages=TURNS, prompt=(), assistant_only=True):
    turns, first = join_turns(list(prompt), messages)
    chat = Chat(turns, list(prompt), first, {}, assistant_only=assistant_only)
    (result,) = encode_chats(tokenizer, [chat])
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
    (result,) = encode_chats(marked, [Chat(TURNS, [], 0, {})])
    assert not isinstance(result, RowError)
    ids, mask = result
    assert np.sum(ids == marked.bos_token_id) == 1
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_chunks_do_not_change_the_result(tokenizer, monkeypatch):
    chats = [Chat([user("a" * i), assistant("b")], [], 0, {}) for i in range(1, 6)]
    whole = encode_chats(tokenizer, chats)
    monkeypatch.setattr("jalign.data.tokenizer.CHUNK", 2)
    parts = encode_chats(tokenizer, chats)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a[0], b[0])  # pyright: ignore
        np.testing.assert_array_equal(a[1], b[1])  # pyright: ignore


def marked_turns(**marks):
    """Four turns with answers; `first=..., second=...` mark the answers."""
    turns = [dict(turn) for turn in TURNS]
    turns[1] |= marks.get("first", {})
    turns[3] |= marks.get("second", {})
    return turns


@pytest.mark.parametrize("name", ["tokenizer", "chatml", "marked"])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_turn_that_is_marked_is_not_trained(name, mark, request):
    tokenizer = request.getfixturevalue(name)
    eos, plain = tokenizer.eos_token, [{"messages": TURNS}]
    (whole,), _ = data.sft_examples(plain, tokenizer, max_length=99)
    rest = {"weight": 1, "train": True}
    for where, want in (("first", f"gh{eos}"), ("second", f"cd{eos}")):
        other = "second" if where == "first" else "first"
        turns = marked_turns(**{where: mark, other: rest})
        turns[0]["weight"] = None  # as SlimOrca has it
        (example,), _ = data.sft_examples(
            [{"messages": turns}], tokenizer, max_length=99
        )
        assert trained(tokenizer, example) == want
        # Only the mask differs, and nothing stands behind the last trained token.
        n = len(example.tokens)
        assert example.tokens.tolist() == whole.tokens[:n].tolist()
        assert example.completion_mask[-1] and (n == len(whole.tokens)) == (
            where == "first"
        )


@pytest.mark.parametrize("name", ["tokenizer", "chatml", "marked"])
def test_a_marked_turn_is_not_trained_where_all_turns_are(name, request):
    tokenizer = request.getfixturevalue(name)
    turns = marked_turns(first={"train": False})
    (example,), _ = data.sft_examples(
        [{"messages": turns}], tokenizer, max_length=99, assistant_only=False
    )
    text = trained(tokenizer, example)
    assert "cd" not in text and "ab" in text and "gh" in text


def test_a_marked_side_or_completion_is_not_trained(chatml):
    row = {"prompt": TURNS[:1], "completion": marked_turns(first={"weight": 0})[1:]}
    (example,), _ = data.sft_examples([row], chatml, max_length=99)
    assert trained(chatml, example) == "gh<|im_end|>"
    turns = marked_turns(first={"weight": 0}, second={"weight": 0})
    with pytest.raises(ValueError, match="no token of it would be trained"):
        data.sft_examples([{"messages": turns}], chatml, max_length=99)


@pytest.mark.parametrize(
    "mark, words",
    [
        ({"weight": 0.5}, "weight': is 0.5; only 0 and 1"),
        ({"train": "no"}, "train': is"),
    ],
)
def test_marks_that_are_neither_yes_nor_no_are_refused(mark, words, chatml):
    with pytest.raises(ValueError, match=r"messages\[1\]") as error:
        row = {"messages": marked_turns(first=mark)}
        data.sft_examples([row], chatml, max_length=99)
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer", "chatml", "marked"])
@pytest.mark.parametrize("form", ["c{}d", "cd{}", "cd{}\n"])
def test_an_eos_inside_an_answer_is_refused(name, form, request):
    tokenizer = request.getfixturevalue(name)
    answer = assistant(form.format(tokenizer.eos_token))
    rows = [
        {"messages": [user("ab"), answer, user("ef"), assistant("gh")]},
        {"prompt": [user("ab")], "completion": [answer]},
    ]
    with pytest.raises(ValueError, match="2 of 2 .*holds the EOS"):
        data.sft_examples(rows, tokenizer, max_length=99)
    pair = {"prompt": [user("ab")], "chosen": [answer], "rejected": [assistant("x")]}
    with pytest.raises(ValueError, match="1 of 1 .*holds the EOS"):
        data.preference_examples([pair], tokenizer, max_length=99)
    # Going on behind it may well be what was rejected.
    pair = {**pair, "chosen": pair["rejected"], "rejected": [answer]}
    assert data.preference_examples([pair], tokenizer, max_length=99)


def test_a_tokenizer_without_a_template_gets_one_that_begins_as_its_texts(tokenizer):
    for made, bos in ((tokenizer, "<s>"), (make_tokenizer(bos=False), "")):
        data.ensure_chat_template(made)
        text = made.apply_chat_template([user("a"), assistant("b")], tokenize=False)
        assert text == f"{bos}User:\na\n\nAssistant:\nb</s>"
        template = made.chat_template
        data.ensure_chat_template(made)
        assert made.chat_template == template
