"""Tests for jalign/data/columns.py and formats.py by whole data sets:
what is read of the rows of published shapes, by the public makers."""

import logging

import pytest

from jalign import data
from tests.data.conftest import assistant, make_tokenizer, trained, user

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED, ANSWER = "Where is Rome?", "In Italy."
CHAT = [user(ASKED), assistant(ANSWER)]
LONGER = [user("Rome was not\n\nbuilt in a day."), assistant(ANSWER)]

# name: (the row as published, the conversation that it stands for)
ANSWERED = {
    "alpaca": ({"instruction": ASKED, "input": "", "output": ANSWER}, CHAT),
    "alpaca with text": (
        {"instruction": ASKED, "input": None, "output": ANSWER, "text": "### All"},
        CHAT,
    ),
    "alpaca with input": (
        {"instruction": "Rome was not", "input": "built in a day.", "output": ANSWER},
        LONGER,
    ),
    "dolly": (
        {
            "instruction": "Rome was not",
            "context": "built in a day.",
            "response": ANSWER,
            "category": "closed_qa",
        },
        LONGER,
    ),
    "openorca": (
        {"id": 1, "system_prompt": "Be brief.", "question": ASKED, "response": ANSWER},
        [SYSTEM, *CHAT],
    ),
    "openorca, empty system": (
        {"system_prompt": "", "question": ASKED, "response": ANSWER},
        CHAT,
    ),
    "gsm8k": ({"question": ASKED, "answer": ANSWER}, CHAT),
    "metamath": ({"query": ASKED, "response": ANSWER, "type": "x"}, CHAT),
    "math": (
        {"problem": ASKED, "solution": ANSWER, "answer": "Italy", "level": "1"},
        CHAT,
    ),
    "problem beside messages": (
        {"problem": "x", "solution": "y", "messages": CHAT},
        CHAT,
    ),
    "input and output": ({"input": ASKED, "output": ANSWER}, CHAT),
    "question and completion": ({"question": ASKED, "completion": ANSWER}, CHAT),
    "system beside strings": (
        {"system": "Be brief.", "prompt": ASKED, "completion": ANSWER},
        [SYSTEM, *CHAT],
    ),
    "system column that is null in this row": (
        {"system": None, "prompt": ASKED, "completion": ANSWER},
        CHAT,
    ),
    "prompt of turns, answer of text": (
        {"prompt": [user(ASKED)], "answer": ANSWER},
        CHAT,
    ),
    "ultrachat": ({"prompt": ASKED, "prompt_id": "1", "messages": CHAT}, CHAT),
    "no_robots": ({"prompt": ASKED, "messages": [SYSTEM, *CHAT]}, [SYSTEM, *CHAT]),
    "lmsys": ({"conversation": CHAT, "language": "English", "turn": 1}, CHAT),
    "capybara": ({"conversation": [{"input": ASKED, "output": ANSWER}]}, CHAT),
    "openthoughts": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": ASKED},
                {"from": "assistant", "value": ANSWER},
            ],
        },
        [SYSTEM, *CHAT],
    ),
    "system twice": (
        {"system": "Be brief.", "messages": [SYSTEM, *CHAT]},
        [SYSTEM, *CHAT],
    ),
    "llama-factory": (
        {
            "instruction": ASKED,
            "input": "",
            "output": ANSWER,
            "system": "Be brief.",
            "history": [],
        },
        [SYSTEM, *CHAT],
    ),
}
TEXTS = {
    "helpsteer": {"prompt": ASKED, "response": ANSWER, "helpfulness": 4, "verbosity": 0}
}


def sft(rows, tokenizer, **options):
    return data.sft_examples(rows, tokenizer, max_length=256, **options)[0]


def prompts(rows, tokenizer, **options):
    return data.prompt_examples(rows, tokenizer, max_prompt_length=256, **options)[0]


def pairs(rows, tokenizer, **options):
    return data.preference_examples(rows, tokenizer, max_length=256, **options)[0]


def before_answer(example):
    return example.tokens[: int(example.completion_mask.argmax())].tolist()


@pytest.mark.parametrize("name", ANSWERED)
def test_a_layout_is_its_conversation_with_the_same_prompt_everywhere(name, chatml):
    row, turns = ANSWERED[name]
    (example,), (want,) = sft([row], chatml), sft([{"messages": turns}], chatml)
    assert example.tokens.tolist() == want.tokens.tolist()
    assert trained(chatml, example) == f"{ANSWER}<|im_end|>"
    (prompt,) = prompts([row], chatml)
    assert prompt.tokens.tolist() == before_answer(example)
    assert prompt.row == row  # a reward function reads all of it


@pytest.mark.parametrize("name", TEXTS)
def test_prompt_and_response_of_strings_stay_strings(name, tokenizer):
    row = TEXTS[name]
    (example,), (prompt,) = sft([row], tokenizer), prompts([row], tokenizer)
    assert tokenizer.decode(example.tokens) == f"<s>{ASKED}{ANSWER}</s>"
    assert prompt.tokens.tolist() == before_answer(example)


def test_history_goes_before_the_question_and_its_answers_are_trained(chatml):
    row = {"instruction": ASKED, "output": ANSWER, "history": [["a", "b"]]}
    (example,) = sft([row], chatml)
    turns = [user("a"), assistant("b"), *CHAT]
    assert example.tokens.tolist() == sft([{"messages": turns}], chatml)[0][0].tolist()
    assert trained(chatml, example) == f"b<|im_end|>{ANSWER}<|im_end|>"
    (prompt,) = prompts([row], chatml)
    assert prompt.source.prompt == turns[:-1]


BOTH = {"chosen": "It is in Italy.", "rejected": "It is in Spain."}
TURNS = {k: [assistant(v)] for k, v in BOTH.items()}
PAIR = {"prompt": ASKED, **BOTH}
REFUSED = [
    (sft, {"prompt": "a", "completion": "b", "label": False}, "'label': says whether"),
    (sft, {"text": "a", "label": 1}, "'label': says whether"),
    (sft, {"messages": CHAT, "images": ["a.png"]}, "'images': holds images"),
    (sft, {"messages": CHAT, "weight": 0.5}, "'weight': weighs the row"),
    (sft, {"instruction": "a", "text": "b"}, "'instruction': is not read beside text"),
    (sft, {"system": "a", "text": "b"}, "'system': is not read beside text"),
    (sft, {"prompt": "a", "text": "b"}, "'prompt': is not read beside text"),
    (
        sft,
        {"prompt": "a", "completion": "b", "question": "c"},
        "'question': is not",
    ),
    (sft, {"question": "a", "response": "b", "answer": "c"}, "'answer': is not read"),
    (sft, {"instruction": "a", "output": ""}, "'output': empty"),
    (sft, {"instruction": "a", "output": None}, "'output': missing or null"),
    (sft, {"instruction": " ", "output": "b"}, "'instruction': empty"),
    (sft, {"question": "a", "context": {"x": 1}, "answer": "b"}, "'context': is an ob"),
    (sft, {"system": "a", "messages": [SYSTEM, *CHAT]}, "'system': says another thing"),
    (
        sft,
        {"system": "a", "system_prompt": "b", "messages": CHAT},
        "says another thing",
    ),
    (sft, {"history": [["a", "b"]], "messages": CHAT}, "'history': stands beside"),
    (sft, {"history": ["a"], "instruction": "b", "output": "c"}, "history[0]"),
    (sft, PAIR, "is a preference pair"),
    (sft, {**PAIR, "answer": "b"}, "--columns completion=chosen, or the other answer"),
    (sft, {**BOTH, "text": "b"}, "is a preference pair"),
    (
        sft,
        {"prompt": ASKED, **{k: [user(ASKED), *v] for k, v in TURNS.items()}},
        "--columns messages=chosen",
    ),
    (sft, {"prompt": ASKED, **TURNS}, "prompt as a list of messages too"),
    (
        sft,
        {"messages": CHAT, "conversations": [user("x"), assistant("y")]},
        "'conversations': says another thing than messages",
    ),
    (
        prompts,
        {"conversations": CHAT, "conversation": "7"},
        "'conversation': says another thing than conversations",
    ),
    (
        sft,
        {"conversation": [{"input": "a", "output": "b", "output_with_loss": False}]},
        "conversation[0].output_with_loss': is not read",
    ),
    (
        sft,
        {"conversation": [{"input": "a", "output": "b", "weight": 0.5}]},
        "conversation[0].weight': is 0.5",
    ),
    (
        prompts,
        {
            "conversation": [
                {"input": "a", "output": "b"},
                {"input": "a", "output": "b", "system": "c"},
            ]
        },
        "conversation[1].system': stands behind",
    ),
    (
        sft,
        {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
        "one message of a tree",
    ),
    (prompts, {"prompt": "a", "images": ["b"]}, "'images': holds images"),
    (pairs, {**PAIR, "question": "Another?"}, "'question': is not read beside prompt"),
    (pairs, {**PAIR, "label": True}, "'label': says whether"),
    (pairs, {**BOTH, "system": "a"}, "'system': needs a prompt column"),
    (pairs, {"conversation_a": CHAT, "conversation_b": CHAT}, "is a vote"),
    (pairs, {"prompt": "a b", "chosen": "a b c", "rejected": "a b d"}, "once more"),
    (pairs, {"question": "a", "chosen": "a b", "rejected": "a c"}, "once more"),
    (
        sft,
        {"prompt": "a b?", "completion": "a b? Yes."},
        "begins with prompt once",
    ),
    (sft, {"prompt": [user("a")], "completion": CHAT[:0]}, "'completion': is an empty"),
    (
        sft,
        {"prompt": [user("a")], "completion": [user("a"), assistant("b")]},
        "repeats",
    ),
]


@pytest.mark.parametrize("make, row, words", REFUSED, ids=range(len(REFUSED)))
def test_what_means_something_is_refused_where_it_is_not_read(make, row, words, chatml):
    with pytest.raises(ValueError, match="1 of 1 rows are unusable") as error:
        make([row], chatml)
    assert words in str(error.value)


def test_an_echoed_word_is_no_repeated_prompt(tokenizer):
    assert sft([{"prompt": "Hello", "completion": "Hello! How are you?"}], tokenizer)
    assert pairs([{"prompt": "a", "chosen": "ab", "rejected": "ac"}], tokenizer)


def test_what_is_not_read_is_said_once(chatml, caplog):
    row, _ = ANSWERED["alpaca with text"]
    with caplog.at_level(logging.INFO, "jalign.data"):
        sft([{**row, "id": i} for i in range(9)], chatml)
        pairs([{**PAIR, "margin": 1.0, "id": 0}], chatml)
        sft([{"prompt": "a", "completion": "b", "margin": 1.0}], chatml)
        sft([{"prompt": "a", "completion": "b"}], chatml)  # nothing to be said
    said = [r.getMessage() for r in caplog.records if "not read" in r.getMessage()]
    assert said == [
        "columns read: instruction, input, output; not read: text, id",
        "columns read: prompt, chosen, rejected, margin; not read: id",
        "columns read: prompt, completion; not read: margin",
    ]


def test_columns_are_named_and_checked(tokenizer):
    rows = [{"q": "a", "a": "b", "label": 0, "prompt": "unrelated"}]
    columns = {"prompt": "q", "completion": "a", "ignore": ["label"]}
    as_text = "prompt=q, completion=a, ignore=label"
    for given in (columns, as_text):
        (example,) = sft(rows, tokenizer, columns=given)
        assert tokenizer.decode(example.tokens) == "<s>ab</s>"
        (prompt,) = prompts(rows, tokenizer, columns=given)
        assert prompt.text == "a" and prompt.row == rows[0]
    both = [{"q": "a", "good": "b", "bad": "c"}]
    (pair,) = pairs(both, tokenizer, columns="prompt=q,chosen=good,rejected=bad")
    assert tokenizer.decode(pair.rejected.tokens) == "<s>ac</s>"
    (better,) = sft([PAIR], tokenizer, columns="completion=chosen")
    assert trained(tokenizer, better) == "It is in Italy.</s>"


@pytest.mark.parametrize(
    "columns, words",
    [
        ("prompt=qq,completion=a", "no row has 'qq'; did you mean 'q'"),
        ("promt=q", "nothing reads 'promt'; did you mean 'prompt'"),
        ("prompt", "expected NAME=COLUMN"),
        ("prompt=q,prompt=a", "'prompt' is given twice"),
        (
            "messages=m,completion=a",
            "'completion' is not read, as the rows are read by messages ('m'): name",
        ),
    ],
)
def test_columns_that_cannot_be_are_errors(columns, words, tokenizer):
    with pytest.raises(ValueError, match="columns") as error:
        sft([{"q": "a", "a": "b", "m": CHAT}], tokenizer, columns=columns)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="'messages': leave 'messages' out by ignore="):
        sft([{"q": "a", "messages": CHAT}], tokenizer, columns="prompt=q")
    with pytest.raises(ValueError, match="1 of 1 rows .* is not read beside text"):
        sft([{"q": "a", "b": "", "text": ""}], tokenizer, columns="prompt=q")


def test_a_tokenizer_with_bos_and_a_plain_template_gives_the_same_prompt_too():
    for name in ("alpaca", "openorca", "gsm8k"):
        tokenizer = make_tokenizer()
        row, _ = ANSWERED[name]
        (prompt,) = prompts([row], tokenizer)
        assert prompt.tokens.tolist() == before_answer(sft([row], tokenizer)[0])
