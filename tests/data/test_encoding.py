"""Tests for jalign/data/encoding.py."""

import numpy as np
import pytest

from jalign import data
from jalign.data.encoding import encode_exchanges, encode_prompts
from jalign.data.formats import Exchange, Prompt
from jalign.data.rows import RowError
from tests.data.conftest import assistant, make_tokenizer, trained, user

TURNS = [user("ab"), assistant("cd"), user("ef"), assistant("gh")]
TEXT = Exchange(None, "ab", {})
PAIR = Exchange("ab", "cd", {})
CHAT = Exchange(None, TURNS, {})
CHAT_PAIR = Exchange(TURNS[:3], TURNS[3:], {})
WHOLE = "User:\nab\n\nAssistant:\ncd</s>User:\nef\n\nAssistant:\ngh</s>"


@pytest.mark.parametrize(
    "exchange, assistant_only, completion_only, want",
    [
        (TEXT, None, None, "ab</s>"),
        (PAIR, None, None, "cd</s>"),
        (PAIR, None, False, "abcd</s>"),
        (CHAT, None, None, "cd</s>gh</s>"),
        (CHAT, False, None, WHOLE),
        (CHAT_PAIR, None, None, "gh</s>"),
        (CHAT_PAIR, False, True, "gh</s>"),
        (CHAT_PAIR, True, False, "cd</s>gh</s>"),
        (CHAT_PAIR, None, False, WHOLE),
    ],
)
def test_what_is_trained(tokenizer, exchange, assistant_only, completion_only, want):
    (example,) = encode_exchanges(
        [exchange], tokenizer, assistant_only, completion_only
    )
    assert not isinstance(example, RowError)
    assert trained(tokenizer, example) == want
    assert not example.completion_mask[0]
    assert example.tokens.dtype == np.int32


def test_a_mixed_list_keeps_its_order(tokenizer):
    mixed = [CHAT, TEXT, CHAT_PAIR, PAIR, TEXT]
    together = encode_exchanges(mixed, tokenizer)
    for exchange, example in zip(mixed, together, strict=True):
        (alone,) = encode_exchanges([exchange], tokenizer)
        np.testing.assert_array_equal(alone[0], example[0])  # pyright: ignore
        np.testing.assert_array_equal(alone[1], example[1])  # pyright: ignore


def test_a_row_without_any_trained_token_is_bad():
    template = "{% for m in messages %}{{ m['content'] }}{% generation %}"
    tokenizer = make_tokenizer(
        chat_template=template + "{% endgeneration %}{% endfor %}"
    )
    (result,) = encode_exchanges([CHAT], tokenizer)
    assert isinstance(result, RowError) and "no token" in result.reason


def test_prompts_of_both_kinds(tokenizer):
    results = encode_prompts(
        tokenizer, [Prompt("ab", {}), Prompt([user("cd")], {}), Prompt("", {})]
    )
    texts = [r[0] for r in results if not isinstance(r, RowError)]
    assert texts == ["ab", "<s>User:\ncd\n\nAssistant:\n", ""]
    for result in results:
        assert not isinstance(result, RowError)
        assert list(result[1]).count(tokenizer.bos_token_id) == 1  # trap 56
    (empty,) = encode_prompts(make_tokenizer(bos=False), [Prompt("", {})])
    assert isinstance(empty, RowError) and "no BOS" in empty.reason


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", "completion": "c</s>d"},
        {"prompt": "ab", "completion": "cd</s></s>"},
        {"prompt": "ab", "completion": "cd</s>\n"},
        {"text": "ab</s>cd"},
        {"text": "<s>ab</s>\n"},
        {"text": "ab</s></s>"},
    ],
)
def test_an_eos_inside_or_a_second_one_is_refused(tokenizer, row):
    with pytest.raises(ValueError, match="holds the EOS '</s>'"):
        data.sft_examples([row], tokenizer, max_length=32)


@pytest.mark.parametrize(
    "row, want",
    [
        ({"prompt": "ab</s>x", "completion": "cd"}, "cd</s>"),
        ({"prompt": "ab", "completion": "cd</s>"}, "cd</s>"),
        # A conversation that is templated already, and ends as it should.
        ({"text": "<s>ab</s>cd</s>"}, "ab</s>cd</s>"),
    ],
)
def test_an_eos_that_ends_a_turn_stays_the_only_one_at_the_end(tokenizer, row, want):
    (example,), _ = data.sft_examples([row], tokenizer, max_length=32)
    assert trained(tokenizer, example) == want
    assert list(example.tokens).count(tokenizer.bos_token_id) == 1


def test_a_bos_that_is_the_eos_is_no_eos_inside():
    tokenizer = make_tokenizer(eos="<s>")
    rows = [{"text": "ab"}, {"text": "<s>ab"}, {"prompt": "a", "completion": "b"}]
    examples, _ = data.sft_examples(rows, tokenizer, max_length=32)
    assert [tokenizer.decode(e.tokens) for e in examples] == ["<s>ab<s>"] * 3
