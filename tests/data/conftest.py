"""Tiny tokenizers made here, without network: byte-level BPE and word-level."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ 'A:' }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
    "{% else %}{{ 'U:' + m['content'] + '|' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


def make_tokenizer(*, bos=True, merges=(), eos="</s>", pad=None, chat_template=None):
    """Byte-level: every byte is a token, plus the merges asked for ("ab" -> a b)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokens = [*specials, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>"))
    core.add_special_tokens(specials)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token=eos,
        pad_token=pad,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chatml():
    return make_tokenizer(bos=False, eos="<|im_end|>", chat_template=CHATML)


@pytest.fixture
def marked():
    return make_tokenizer(chat_template=MARKED)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def trained(tokenizer, example):
    """The text that an example trains."""
    return tokenizer.decode(example.tokens[example.completion_mask])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}
