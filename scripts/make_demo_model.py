"""Makes everything in jalign/demo/assets: data, tokenizer and pre-trained model.

    python scripts/make_demo_model.py                # all of it, about 8 minutes
    python scripts/make_demo_model.py --data-only    # only the JSONL files, a second

The data comes from the generator in jalign/demo/task.py, so a rerun writes the same
files. The model is a LLaMA of 0.87M parameters, pre-trained on `task.base_documents`
by jalign's own training step; its weights are stored in float16.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import jax
import numpy as np

from jalign import data, models, train
from jalign.demo import task

ASSETS = Path(__file__).resolve().parents[1] / "jalign" / "demo" / "assets"
SEED = 0
EOS, PAD = "<|end|>", "<|pad|>"
VOCAB, LENGTH = 1024, 128
# Rows of each kind: for training, held out.
PROMPTS, PAIRS, DEMONSTRATIONS = (1024, 256), (1536, 256), (2048, 128)


def write_data(out: Path) -> None:
    """The prompts, preference pairs and demonstrations as JSONL files."""
    for held_out, part in enumerate(("train", "heldout")):
        count = max(PROMPTS[held_out], PAIRS[held_out], DEMONSTRATIONS[held_out])
        prompts = task.make_prompts(SEED, count, held_out=bool(held_out))
        demonstrations = prompts[: DEMONSTRATIONS[held_out]]
        files = {
            "prompts": [{"prompt": p} for p in prompts[: PROMPTS[held_out]]],
            "preferences": task.preference_rows(SEED, prompts[: PAIRS[held_out]]),
            "sft": task.sft_rows(SEED, demonstrations),
        }
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{name}_{part}.jsonl").write_text(text, encoding="utf-8")


def make_tokenizer(out: Path):
    """A byte-level BPE of 1024 tokens in which most words are one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(itertools.islice(task.base_documents(SEED + 1), 20_000))
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTH,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--data-only", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out)
    if not args.data_only:
        pretrain(args, make_tokenizer(args.out / "model"))


if __name__ == "__main__":
    main()
