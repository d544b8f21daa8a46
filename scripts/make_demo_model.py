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
import jax.numpy as jnp
import numpy as np

from jalign import data, models
from jalign.demo import task
from jalign.train.objectives import make_sft_objective
from jalign.train.optim import OptimConfig, make_optimizer
from jalign.train.step import init_state, make_train_step

ASSETS = Path(__file__).resolve().parents[1] / "jalign" / "demo" / "assets"
SEED = 0
EOS, PAD = "<|end|>", "<|pad|>"
VOCAB, LENGTH = 1024, 128
# Rows of each kind: for training, held out.
PROMPTS, PAIRS, DEMONSTRATIONS = (1024, 256), (3072, 256), (2048, 128)


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
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
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


def pretrain(args: argparse.Namespace, tokenizer) -> None:
    """Trains the base model on packed documents and writes it beside the tokenizer."""
    config = models.ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
        max_position=LENGTH,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    model = models.Model(config)
    optim = OptimConfig(
        learning_rate=2e-3, schedule="cosine", warmup_steps=100, weight_decay=0.05
    )
    tx, schedule = make_optimizer(optim, args.steps)
    step = make_train_step(make_sft_objective(model), tx, schedule=schedule)
    # Matrices of width 128 learn sooner from a wider start than large models' 0.02.
    params = jax.tree.map(
        lambda x: x if (x == 1).all() else 3 * x, model.init(jax.random.key(SEED))
    )
    state = init_state(params, tx, jax.random.key(SEED))
    start, recent = time.perf_counter(), []
    for i, batch in enumerate(batches(args, tokenizer), 1):
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
        recent.append(metrics["loss"])
        if i % 50 == 0:
            loss, seconds = float(np.mean(recent)), time.perf_counter() - start
            print(f"step {i}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
            recent = []
    models.save(args.out / "model", model, state.params, tokenizer)
    halve(args.out / "model" / "model.safetensors")


def batches(args: argparse.Namespace, tokenizer):
    """Packed rows of base documents, each document trained from its second token."""
    texts = itertools.islice(task.base_documents(SEED), args.documents)
    rows = [{"text": text} for text in texts]
    examples, _ = data.sft_examples(rows, tokenizer, max_length=LENGTH)
    return data.make_loader(
        data.pack(examples, LENGTH),
        batch_size=args.batch_size,
        seed=SEED,
        collate=data.collate_tokens,
        max_length=LENGTH,
        steps=args.steps,
    )


def halve(path: Path) -> None:
    """Rewrites a float32 safetensors file in float16."""
    from safetensors.numpy import load_file, save_file

    tensors = {k: v.astype(np.float16) for k, v in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--data-only", action="store_true")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(args.out)
    if not args.data_only:
        pretrain(args, make_tokenizer(args.out / "model"))


if __name__ == "__main__":
    main()
