"""Tests for jalign/rewards/samples.py: functions written for TRL work as they are."""

import functools

import numpy as np
import pytest

from jalign import rewards
from jalign.data.formats import Prompt
from jalign.rewards import Samples
from jalign.rewards.samples import takes_columns

ASKED = [{"role": "user", "content": "2 + 2?"}]
ROWS = [
    {"prompt": "1 + 1 =", "answer": "2", "completion": "2"},
    {"prompt": ASKED, "answer": "4", "level": 3},
]
BATCH = ["1 + 1 =", "<templated>"], [" 2", "5"], ROWS
SAMPLES = Samples(
    *BATCH,
    [Prompt("1 + 1 =", {}), Prompt(ASKED, {})],
    [[1], [2]],
    [[7, 8], (9,)],
    None,
    (),
)


def trl(completions, **kwargs): ...
def trl_column(prompts, completions, answer, **kwargs): ...
def trl_few(prompts, completions): ...
async def trl_async(completions, **kwargs): ...
def trl_keywords(**kwargs): ...
def trl_ids(completion_ids, **kwargs): ...  # as TRL's soft overlong punishment
def trl_columns(prompts, answer, level, **kwargs): ...
def ours(prompts, completions, rows): ...
def ours_named_otherwise(p, c, r): ...
def ours_with_more(prompts, completions, rows=None, **kwargs): ...


class Scorer:
    def __call__(self, completions, answer, **kwargs): ...


@functools.wraps(trl)
def wrapped(*args, **kwargs): ...


@pytest.mark.parametrize(
    ("function", "by_columns"),
    [
        (trl, True),
        (trl_column, True),
        (trl_few, True),
        (trl_async, True),
        (trl_keywords, True),
        (trl_ids, True),
        (trl_columns, True),
        (Scorer(), True),
        (wrapped, True),
        (functools.partial(trl_column, answer=["4"]), True),
        (ours, False),
        (ours_named_otherwise, False),
        (ours_with_more, False),
        (lambda *batch: batch, False),
    ],
)
def test_the_signature_tells_the_form(function, by_columns):
    assert takes_columns(function, "f") is by_columns


def neither(prompts, answers): ...
def rows_and_keywords(completions, rows, **kwargs): ...
def of_either(*args, **kwargs): ...


@pytest.mark.parametrize("function", [neither, rows_and_keywords, of_either, max])
def test_a_signature_that_is_neither_is_told_of_both(function):
    with pytest.raises(
        ValueError, match="reward mine.*prompts, completions, rows.*TRL"
    ):
        rewards.checked(function, name="mine")


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_trl_functions_get_what_trl_gives_them(timeout):
    seen = {}

    def judge(prompts, completions, completion_ids, answer, level=None, **kwargs):
        seen.update(locals())
        answer.clear()  # a copy
        return [0.5, None]

    got = rewards.checked(judge, timeout=timeout)(*BATCH, samples=SAMPLES)
    np.testing.assert_array_equal(got, np.float32([0.5, np.nan]))
    assert seen["prompts"] == ["1 + 1 =", ASKED]
    assert seen["completions"] == [" 2", [{"role": "assistant", "content": "5"}]]
    assert seen["completion_ids"] == [[7, 8], [9]]
    assert seen["level"] == [None, 3] and seen["kwargs"] == {}
    # Without token ids too, and with no more than it asks for.
    few = rewards.checked(lambda completions, answer: [len(c) for c in completions])
    assert few(*BATCH).tolist() == [2.0, 1.0]
    every = rewards.checked(lambda **given: [len(given), 0])
    assert every(*BATCH, samples=SAMPLES).tolist() == [5.0, 0.0]
    assert every(*BATCH).tolist() == [4.0, 0.0]


def test_a_coroutine_is_awaited():
    async def judge(completions, **kwargs):
        return [float(len(completions))] * 2

    assert rewards.checked(judge, timeout=60.0)(*BATCH).tolist() == [2.0, 2.0]


def test_a_column_that_is_not_there_is_named():
    asks = rewards.checked(lambda completions, solution, **_: [], name="mine")
    with pytest.raises(ValueError, match="mine asks for solution.*answer"):
        asks(*BATCH)
    state = rewards.checked(lambda completions, trainer_state: [], name="mine")
    with pytest.raises(ValueError, match="asks for trainer_state"):
        state(*BATCH)
    hidden = [{"prompt": "a", "completions": "b"}]
    with pytest.raises(ValueError, match="column 'completions'"):
        asks(["a"], ["b"], hidden)


def test_results_are_held_to_the_same_and_the_failing_row_is_named():
    def judge(completions, answer, **kwargs):
        return [1 / (int(text) - 4) for text in answer]

    with pytest.raises(ValueError, match="raised ZeroDivisionError.*row 1 of 2.*2 . 2"):
        rewards.checked(judge)(*BATCH)
    nan = rewards.checked(lambda completions, **_: [float("nan"), 1.0])
    with pytest.raises(ValueError, match="gave nan for row 0"):
        nan(*BATCH)
