"""Tests for jalign/data/tokenizer.py."""

import numpy as np
import pytest
from tokenizers import Regex, normalizers

from jalign import data
from jalign.data.tokenizer import (
    check_vocab,
    encode_pairs,
    encode_plain,
    encode_texts,
    load_tokenizer,
)
from tests.data.conftest import make_tokenizer


def test_load_settles_pad_and_needs_eos(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "ok")
    assert load_tokenizer(tmp_path / "ok").pad_token == "<unk>"
    make_tokenizer(eos=None).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="no_eos: the tokenizer has no EOS"):
        load_tokenizer(tmp_path / "no_eos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "empty")


def test_trap54_pad_equal_to_eos_is_replaced_and_logged(tmp_path, caplog):
    make_tokenizer(pad="</s>").save_pretrained(tmp_path)
    with caplog.at_level("INFO", "jalign.data"):
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert "'</s>'" in caplog.text and "'<unk>'" in caplog.text
    assert len(tokenizer) == len(make_tokenizer())  # no token was added


def test_check_vocab():
    tokenizer = make_tokenizer()
    check_vocab(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match="embeds only 100"):
        check_vocab(tokenizer, 100)


def test_trap55_a_merge_across_the_border_keeps_the_prompts_own_tokens():
    tokenizer = make_tokenizer(merges=[("a", "b")])
    ((ids, start),) = encode_pairs(tokenizer, [("xa", "bc")])
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "x", "a", "b", "c", "</s>"]
    assert start == 3  # as the prompt alone is tokenized when sampling
    assert list(ids[:start]) == list(encode_texts(tokenizer, ["xa"])[0])


def test_trap55_a_tokenizer_that_puts_spaces_is_split_in_the_one_text(real_data):
    tokenizer = load_tokenizer(real_data / "stories260k")
    ((ids, start),) = encode_pairs(tokenizer, [("One day", "s later")])
    assert tokenizer.decode(ids) == "<s> One days later</s>"
    assert "later" in tokenizer.decode(ids[start:])


@pytest.mark.parametrize(
    "prompt, completion",
    [("Tim. ", "They ran."), ("a  ", "  b"), ("x ", "\n\u65e5"), ("One day", "s ago")],
)
def test_trap55_a_tokenizer_that_puts_spaces_trains_what_sampling_sees(
    real_data, prompt, completion, caplog
):
    tokenizer = load_tokenizer(real_data / "stories260k")
    row = {"prompt": prompt, "completion": completion}
    (example,), _ = data.sft_examples([row], tokenizer, max_length=64)
    (asked,), _ = data.prompt_examples([row], tokenizer, max_prompt_length=64)
    start = int(example.completion_mask.argmax())
    assert example.tokens[:start].tolist() == asked.tokens.tolist()
    assert tokenizer.decode(example.tokens) == f"<s> {prompt}{completion}</s>"
    assert not caplog.records  # nothing to be warned of


def test_trap55_what_cannot_be_told_apart_is_warned_of(caplog):
    """A tokenizer that writes another text where a text begins."""
    tokenizer = make_tokenizer(merges=[("a", "b"), ("\u010a", "b")])  # a line break + b
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex("^b"), "xb")]
    )
    encode_pairs(tokenizer, [("a", "c"), ("a", "bc")])
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert message.startswith(
        "1 of 2 prompts are not trained with the tokens that samp"
    )
    assert "to the start of the completion" in message


@pytest.mark.parametrize("bos", [True, False])
def test_trap56_bos_is_neither_doubled_nor_missing(bos):
    tokenizer = make_tokenizer(bos=bos)
    plain, written = encode_texts(tokenizer, ["ab", "<s>ab"])
    if bos:
        assert tokenizer.convert_ids_to_tokens(plain) == ["<s>", "a", "b"]
    else:
        assert tokenizer.convert_ids_to_tokens(plain) == ["a", "b"]
    assert tokenizer.convert_ids_to_tokens(written) == ["<s>", "a", "b"]


def same_ids(tokenizer):
    """encode_plain and the tokenizer agree, whatever its file says of lengths."""
    texts = ["One  day,\n\ta boy\u2019s caf\u00e9.", "", "<s>hi</s> 12", " x" * 700]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    got = encode_plain(tokenizer, texts)
    want = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    assert [row.tolist() for row in got] == want
    assert all(row.dtype == np.int32 for row in got)


def test_plain_ids_are_those_of_a_call_of_the_tokenizer():
    same_ids(make_tokenizer(merges=[("x", "x")]))


def test_plain_ids_of_a_real_tokenizer(real_data):
    same_ids(load_tokenizer(real_data / "stories260k"))


def test_trap58_eos_follows_directly_and_once():
    tokenizer = make_tokenizer()
    for completion in ("b", "b</s>"):
        ((ids, _),) = encode_pairs(tokenizer, [("a", completion)])
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "b", "</s>"]
        assert ids.dtype == np.int32
