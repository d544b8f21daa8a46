"""Tests for jalign/rewards/verifiers.py."""

import time
from fractions import Fraction

import pytest

from jalign.rewards import checked, final_number, gsm8k, gsm8k_format


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 24 clips.\n#### 72", 72),
        ("#### 72 clips in 2 months", 72),
        ("#### 5\nQuestion: 3 and 4?\n#### 7", 7),
        ("first #### 5, then no number ####", None),
        ("The answer is: $1,234.50.", "1234.5"),
        ("the final answer is 3. (checked 2 times)", 3),
        ("so \\boxed{1{,}000} and \\$5", 1000),
        ("48/2 = <<48/2=24>>24", 24),
        ("5-3=2, so 5-3", 3),
        ("x = -3", -3),
        ("-$5", -5),
        ("$-5", -5),
        ("minus sign −7", -7),
        ("- 3 apples", 3),
        ("a share of 3/4", "3/4"),
        ("2 1/2 hours", "5/2"),
        ("3/0", None),
        ("on 10/12/2020", 2020),
        ("50%", 50),
        ("10km", 10),
        (".50", "1/2"),
        ("72.", 72),
        ("0072.00", 72),
        ("12,345,678", 12345678),
        ("1,2,3", 3),
        ("€ 1,5", 5),
        ("no number at all", None),
        ("", None),
        ("9" * 100_000, None),
    ],
)
def test_the_final_number_of_tricky_texts(text, number):
    want = None if number is None else Fraction(number)
    assert final_number(text) == want


def test_a_long_text_takes_no_long_time():
    start = time.process_time()
    for text in ("1" * 200_000, "1/" * 50_000, "1 " * 50_000, "1," * 50_000):
        final_number(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "six times twelve\n#### 72"},
        {"answer": 72},
        {"answer": "$72.00"},
        {"completion": "12 * 6 = <<12*6=72>>72\n#### 72"},
        {"completion": [{"role": "assistant", "content": "#### 72"}]},
        {"solution": "hence \\boxed{72}"},
        {"answer": None, "solution": "#### 72"},
        {"answer": "see the solution", "solution": "#### 72"},
    ],
)
def test_gsm8k_compares_with_the_answer_of_the_row(row):
    completions = ["#### 72", "72.0", "The answer is 144/2", "7 2", "71", ""]
    size = len(completions)
    assert gsm8k([""] * size, completions, [row] * size) == [1, 1, 1, 0, 0, 0]


def test_a_row_without_an_answer_is_named():
    rows = [{"answer": "1"}, {"prompt": "?", "answer": "two"}]
    reward = checked(gsm8k, name="gsm8k")
    with pytest.raises(ValueError, match="no right answer in the row's answer.*row 1"):
        reward(["", ""], ["1", "2"], rows)


def test_the_format_is_one_final_answer():
    texts = ["so\n#### 72", "#### $1,000 \n", "72", "#### 72 clips", "#### 1\n#### 2"]
    assert gsm8k_format([""] * 5, texts, [{}] * 5) == [1, 1, 0, 0, 0]
