"""What begins and ends a text, in the ways of OPT, BLOOM and Pythia."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jalign import data

SPECIALS = {"<s>": 0, "<pad>": 1, "</s>": 2}


def tokenizer_of(leading, **special):
    """Byte-level; `leading` begins each text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = SPECIALS | {letter: i for i, letter in enumerate(letters, 3)}
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if leading:
        core.post_processor = processors.TemplateProcessing(
            single=f"{leading} $A", special_tokens=[(leading, SPECIALS[leading])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", **special
    )


CASES = {
    "opt": ([2], tokenizer_of("</s>", bos_token="</s>")),  # the EOS begins a text, too
    "bloom": ([], tokenizer_of(None, bos_token="<s>")),  # a BOS that nothing writes
    "gpt_neox": ([], tokenizer_of(None, bos_token="</s>")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_eos_is_trained_and_what_begins_a_text_is_not(name):
    leading, tokenizer = CASES[name]
    letters = {row: tokenizer.convert_tokens_to_ids(list(row)) for row in ("2+", "4")}
    want = [*leading, *letters["2+"], *letters["4"], 2]
    trained = [False] * (len(want) - 2) + [True, True]
    row = {"prompt": "2+", "completion": "4"}
    (example,), _ = data.sft_examples([row], tokenizer, max_length=16)
    assert example.tokens.tolist() == want
    assert example.completion_mask.tolist() == trained
    pair = {"prompt": "2+", "chosen": "4", "rejected": "44"}
    (example,), _ = data.preference_examples([pair], tokenizer, max_length=16)
    assert example.chosen.tokens.tolist() == want
    assert example.chosen.completion_mask.tolist() == trained
    (example,), _ = data.sft_examples([{"text": "4"}], tokenizer, max_length=16)
    assert example.tokens.tolist() == [*leading, *letters["4"], 2]
    assert list(data.stop_tokens(tokenizer, ())) == [2]


@pytest.mark.parametrize("name", CASES)
def test_a_chat_begins_as_a_text_does_and_ends_with_the_eos(name):
    leading, tokenizer = CASES[name]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}]
    (example,), _ = data.sft_examples(rows, tokenizer, max_length=64)
    ids = example.tokens.tolist()
    assert ids[: len(leading)] == leading and ids[-1] == 2
    assert ids.count(2) == 1 + leading.count(2) and 0 not in ids
    assert example.completion_mask[-1] and not example.completion_mask[:3].any()
