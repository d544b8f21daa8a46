"""Tests for jalign/data/examples.py."""

import numpy as np
import pytest

from jalign.data.examples import (
    example_length,
    preference_examples,
    prompt_examples,
    sft_examples,
)
from jalign.data.sources import load_rows
from jalign.data.tokenizer import load_tokenizer
from tests.data.conftest import assistant, make_tokenizer, trained, user

PAIR = {"prompt": "ab", "completion": "cdef"}  # <s> a b | c d e f </s>
PREFERENCE = {"prompt": "a", "chosen": "bc", "rejected": "d", "margin": 1.5}


def test_sft_counts(tokenizer):
    rows = [PAIR, {"text": "a"}, {"prompt": "abcdefghi", "completion": "x"}]
    examples, counts = sft_examples(rows, tokenizer, max_length=7)
    assert [trained(tokenizer, e) for e in examples] == ["cdef", "a</s>"]
    want = {"rows": 3, "examples": 2, "over_length": 1, "truncated": 1, "bad_rows": 0}
    assert counts == want


def test_trap54_pad_equal_to_eos_hides_nothing():
    tokenizer = make_tokenizer(pad="</s>")
    (example,), _ = sft_examples([PAIR], tokenizer, max_length=16)
    assert example.tokens[-1] == tokenizer.eos_token_id
    assert example.completion_mask[-1]


def test_trap57_truncation_keeps_bos_and_never_forges_an_eos(tokenizer):
    (whole,), _ = sft_examples([PAIR], tokenizer, max_length=8)
    (cut,), counts = sft_examples([PAIR], tokenizer, max_length=6)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:6])
    assert cut.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in cut.tokens
    assert counts["truncated"] == 1
    with pytest.raises(ValueError, match="max_length=6"):
        sft_examples([PAIR], tokenizer, max_length=6, over_length="drop")


def test_trap58_no_space_before_eos(tokenizer):
    (example,), _ = sft_examples([PAIR], tokenizer, max_length=16)
    assert trained(tokenizer, example) == "cdef</s>"


def test_all_rows_over_long_names_the_option(tokenizer):
    with pytest.raises(ValueError, match="max_length=3"):
        sft_examples([PAIR] * 3, tokenizer, max_length=3)
    with pytest.raises(ValueError, match="max_prompt_length=2"):
        prompt_examples([PAIR], tokenizer, max_prompt_length=2)


def test_bad_rows_are_errors_or_counts(tokenizer, write_jsonl):
    rows = [PAIR, {"prompt": "a", "completion": None}, {"prompt": "a", "completion": 1}]
    path = write_jsonl(rows)
    with pytest.raises(ValueError, match="2 of 3 rows") as error:
        sft_examples(load_rows(path), tokenizer, max_length=8)
    assert f"{path} row 2, field 'completion': missing or null" in str(error.value)
    _, counts = sft_examples(load_rows(path), tokenizer, max_length=8, bad_rows="skip")
    assert counts["rows"] == 3 and counts["bad_rows"] == 2
    assert counts["bad_rows/completion: missing or null"] == 1


def test_lines_that_could_not_be_read_are_counted_too(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    rows = load_rows(path, bad_rows="skip")
    _, counts = sft_examples(rows, tokenizer, max_length=8, bad_rows="skip")
    assert (counts["rows"], counts["examples"], counts["bad_rows"]) == (2, 1, 1)


def test_masks_that_do_not_apply_and_bad_options(tokenizer):
    def make(rows, **options):
        return sft_examples(rows, tokenizer, **{"max_length": 8, **options})

    with pytest.raises(ValueError, match="assistant_only=True needs conversations"):
        make([PAIR], assistant_only=True)
    with pytest.raises(ValueError, match="completion_only=True needs prompt"):
        make([{"text": "a"}], completion_only=True)
    with pytest.raises(ValueError, match="max_length must be"):
        make([PAIR], max_length=1)
    with pytest.raises(ValueError, match="over_length must be"):
        make([PAIR], over_length="split")
    with pytest.raises(ValueError, match="bad_rows must be"):
        make([PAIR], bad_rows="mend")
    with pytest.raises(ValueError, match="no rows"):
        make([])


def test_preferences(tokenizer):
    turns = {
        "prompt": [user("a")],
        "chosen": [assistant("b")],
        "rejected": [assistant("c")],
    }
    examples, _ = preference_examples([PREFERENCE, turns], tokenizer, max_length=64)
    assert [e.margin for e in examples] == [1.5, 0.0]
    assert [trained(tokenizer, e.chosen) for e in examples] == ["bc</s>", "b</s>"]
    assert [trained(tokenizer, e.rejected) for e in examples] == ["d</s>", "c</s>"]
    assert example_length(examples[0]) == 5


def test_trap62_both_sides_of_a_pair_end_in_their_own_eos():
    tokenizer = make_tokenizer(pad="</s>")
    (pair,), _ = preference_examples([PREFERENCE], tokenizer, max_length=16)
    ends = [len(side.tokens) - 1 for side in (pair.chosen, pair.rejected)]
    assert ends == [4, 3]  # not the same prompt position, although pad is EOS
    assert pair.chosen.tokens[4] == pair.rejected.tokens[3] == tokenizer.eos_token_id


def test_trap63_empty_and_equal_completions_are_bad_rows(tokenizer):
    bad = [
        {**PREFERENCE, "chosen": ""},
        {**PREFERENCE, "chosen": "", "rejected": ""},
        {**PREFERENCE, "chosen": "d"},
        {**PREFERENCE, "chosen": "d</s>"},  # equal once tokenized
    ]
    for row in bad:
        with pytest.raises(ValueError, match="1 of 1 rows are unusable"):
            preference_examples([row], tokenizer, max_length=16)
    examples, counts = preference_examples(
        [PREFERENCE, *bad], tokenizer, max_length=16, bad_rows="skip"
    )
    assert len(examples) == 1 and counts["bad_rows"] == 4


def test_pairs_that_truncation_empties_or_makes_equal_are_dropped(tokenizer):
    rows = [
        PREFERENCE,
        {"prompt": "a", "chosen": "bcdef", "rejected": "bcdxy"},  # equal in 5 tokens
        {"prompt": "abcde", "chosen": "x", "rejected": "y"},  # nothing left
        {"prompt": "a", "chosen": "bcdef", "rejected": "x"},  # cut
    ]
    examples, counts = preference_examples(rows, tokenizer, max_length=5)
    assert [trained(tokenizer, e.chosen) for e in examples] == ["bc</s>", "bcd"]
    assert (counts["over_length"], counts["truncated"]) == (2, 1)
    examples, counts = preference_examples(
        rows, tokenizer, max_length=5, over_length="drop", bad_rows="skip"
    )
    assert len(examples) == 1 and counts["over_length"] == 3


def test_prompts_keep_their_row_and_are_never_cut(tokenizer):
    rows = [{"prompt": "ab", "answer": "4"}, {"prompt": "abcdef"}]
    (example,), counts = prompt_examples(rows, tokenizer, max_prompt_length=4)
    assert example.text == "ab" and example.row == rows[0]
    assert tokenizer.decode(example.tokens) == "<s>ab"
    assert counts["over_length"] == 1


MAKERS = [
    (sft_examples, "max_length", {"prompt": "a", "completion": "b"}),
    (preference_examples, "max_length", PREFERENCE),
    (prompt_examples, "max_prompt_length", {"prompt": "a"}),
]


@pytest.mark.parametrize("make, limit, short", MAKERS, ids=[m[1] for m in MAKERS])
def test_losing_many_rows_is_a_warning_and_most_an_error(
    make, limit, short, tokenizer, caplog
):
    long = {**short, "prompt": "a" * 9}

    def lose(count, **options):
        caplog.clear()
        rows = [long] * count + [short] * (20 - count)
        return make(rows, tokenizer, **{limit: 8}, **options)[0]

    assert len(lose(2)) == 18 and not caplog.records  # a tenth
    assert len(lose(3)) == 17
    assert f"3 of the 20 usable rows do not fit: with {limit}=8" in caplog.text
    assert len(lose(10)) == 10
    with pytest.raises(ValueError, match=f"11 of the 20 .* with {limit}=8 .*raise it"):
        lose(11)
    assert len(lose(19, bad_rows="skip")) == 1 and "19 of the 20" in caplog.text
    with pytest.raises(ValueError, match="20 of the 20"):
        lose(20, bad_rows="skip")


def test_skipping_many_bad_rows_is_said_and_never_refused(tokenizer, caplog):
    rows = [PAIR, {"prompt": "a", "completion": ""}, {"prompt": 1, "completion": "b"}]
    examples, _ = sft_examples(rows, tokenizer, max_length=8, bad_rows="skip")
    assert len(examples) == 1
    assert "2 of 3 rows are unusable and left out (1 x completion: empty" in caplog.text
    caplog.clear()
    sft_examples([PAIR] * 9 + rows[1:2], tokenizer, max_length=8, bad_rows="skip")
    assert not caplog.records


def test_real_data(real_data):
    tokenizer = load_tokenizer(real_data / "stories260k")
    rows = load_rows(real_data / "gsm8k_test.jsonl", limit=200)
    examples, _ = sft_examples(rows, tokenizer, max_length=512)
    text = tokenizer.decode(examples[0].tokens[examples[0].completion_mask])
    assert text.startswith("Janet sells") and text.endswith("#### 18</s>")
    rows = load_rows(real_data / "alpaca_eval_preferences_test.jsonl", limit=50)
    pairs, _ = preference_examples(rows, tokenizer, max_length=512)
    assert all(len(p.chosen.tokens) <= 512 for p in pairs)
    prompts, _ = prompt_examples(rows, tokenizer, max_prompt_length=512)
    first = prompts[0].tokens  # what sampling sees is what training saw
    np.testing.assert_array_equal(pairs[0].chosen.tokens[: len(first)], first)
