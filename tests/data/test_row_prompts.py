"""Tests for jalign/data/formats.py: what a row asks, by all makers."""

import pytest

from tests.data.conftest import assistant, trained, user
from tests.data.test_row_layouts import (
    ANSWER,
    ASKED,
    BOTH,
    CHAT,
    SYSTEM,
    TURNS,
    before_answer,
    pairs,
    prompts,
    sft,
)

PAIRED = {
    "orca_dpo_pairs": ({"system": "Be brief.", "question": ASKED, **BOTH}, [SYSTEM]),
    "distilabel": ({"system": "", "input": ASKED, **BOTH}, []),
    "instruction": ({"instruction": ASKED, "input": "", **BOTH}, []),
    "question beside turns": ({"question": ASKED, **TURNS}, []),
    "argilla": (
        {
            "instruction": ASKED,
            "chosen_response": BOTH["chosen"],
            "rejected_response": BOTH["rejected"],
        },
        [],
    ),
    "stack-exchange-paired": (
        {"question": ASKED, "response_j": "It is in Italy.", "response_k": "In Spain."},
        [],
    ),
    "an answer for verifiers beside the pair": (
        {"question": ASKED, "answer": "Italy", **BOTH},
        [],
    ),
    "another conversation beside strings": (
        {"question": ASKED, **BOTH, "messages": [user("x"), assistant("y")]},
        [],
    ),
    "string beside turns of the assistant": ({"prompt": ASKED, **TURNS}, []),
    "string beside later turns": (
        {
            "prompt": ASKED,
            **{k: [SYSTEM, user(ASKED), assistant(v)] for k, v in BOTH.items()},
        },
        [SYSTEM],
    ),
    "whole conversations": (
        {
            "prompt": ASKED,
            "messages": CHAT,
            **{k: [user(ASKED), assistant(v)] for k, v in BOTH.items()},
        },
        [],
    ),
    "system beside whole conversations": (
        {
            "system": "Be brief.",
            **{k: [user(ASKED), assistant(v)] for k, v in BOTH.items()},
        },
        [SYSTEM],
    ),
}


@pytest.mark.parametrize("name", PAIRED)
def test_the_question_of_a_pair_is_its_prompt(name, chatml):
    row, system = PAIRED[name]
    (pair,) = pairs([row], chatml)
    assert trained(chatml, pair.chosen) == "It is in Italy.<|im_end|>"
    (want,) = prompts([{"prompt": [*system, user(ASKED)]}], chatml)
    assert before_answer(pair.chosen) == want.tokens.tolist()
    assert before_answer(pair.rejected) == want.tokens.tolist()
    assert prompts([row], chatml)[0].tokens.tolist() == want.tokens.tolist()


def test_a_string_that_repeats_a_turn_is_asked_with_the_turns_before(chatml):
    start = [user("Hi"), assistant("Yes?"), user("And?")]
    row = {"prompt": "And?", **{k: [*start, *v] for k, v in TURNS.items()}}
    (pair,), (prompt,) = pairs([row], chatml), prompts([row], chatml)
    assert prompt.source.prompt == start
    assert prompt.tokens.tolist() == before_answer(pair.chosen)
    same = {**row, "rejected": row["chosen"]}  # no pair to train on, but a prompt
    assert prompts([same], chatml)[0].tokens.tolist() == prompt.tokens.tolist()


def test_the_prompt_of_string_pairs_is_theirs_whatever_stands_beside(tokenizer):
    row = {"prompt": ASKED, **BOTH, "messages": [user("x"), assistant("y")]}
    (pair,), (prompt,) = pairs([row], tokenizer), prompts([row], tokenizer)
    assert prompt.text == ASKED
    assert prompt.tokens.tolist() == before_answer(pair.rejected)


TOOL = {"type": "function", "function": {"name": "f"}}
ALIKE = {  # (question, one that stands beside it): each refused by all makers
    f"{first} + {second}": ({first: ASKED, second: "Another thing"}, None)
    for first, second in (
        ("question", "input"), ("query", "context"), ("prompt", "context"),
        ("prompt", "input"), ("prompt", "question"), ("problem", "input"),
        ("instruction", "question"),
    )
} | {
    "alpaca by columns": (
        {"instruction": ASKED, "input": "Another thing"},
        "prompt=instruction",
    ),
    "tools beside strings": ({"prompt": ASKED, "tools": [TOOL]}, None),
    "variables beside strings": (
        {"prompt": ASKED, "chat_template_kwargs": {"enable_thinking": False}},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_all_makers_refuse_what_one_does(name, chatml):
    row, columns = ALIKE[name]
    said = set()
    for make, rest in (
        (sft, {"completion": "b"}),
        (prompts, {"answer": 3}),
        (pairs, BOTH),
    ):
        with pytest.raises(ValueError, match="ignore=") as error:
            make([row | rest], chatml, columns=columns)
        said.add(str(error.value).partition("row 1")[2].partition(" is ")[0])
    assert len(said) == 1


def test_blank_columns_beside_the_prompt_mean_nothing(chatml):
    blank = {
        "input": "",
        "context": None,
        "tools": [],
        "chat_template_kwargs": {"a": None},
    }
    row = {"prompt": ASKED, "completion": "b", **blank}
    assert sft([row], chatml) and prompts([row], chatml)[0].text == ASKED


def test_exchanges_of_a_conversation_keep_their_marks_and_system(chatml):
    first = {"input": "a", "output": "b", "weight": 0, "system": "Be brief."}
    row = {"conversation": [first, {"input": ASKED, "output": ANSWER, "system": ""}]}
    (example,) = sft([row], chatml)
    turns = [SYSTEM, user("a"), {**assistant("b"), "weight": 0}, *CHAT]
    (want,) = sft([{"messages": turns}], chatml)
    assert example.tokens.tolist() == want.tokens.tolist()
    assert trained(chatml, example) == f"{ANSWER}<|im_end|>"


def test_equal_conversations_may_stand_beside_each_other(chatml):
    shared = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]
    (example,) = sft([{"messages": CHAT, "conversations": shared}], chatml)
    assert trained(chatml, example) == f"{ANSWER}<|im_end|>"


def test_verl_rows_are_prompts(chatml):
    row = {"data_source": "x", "prompt": [user(ASKED)], "reward_model": {"style": "r"}}
    (prompt,) = prompts([row], chatml)
    assert prompt.source.prompt == [user(ASKED)] and prompt.row == row
