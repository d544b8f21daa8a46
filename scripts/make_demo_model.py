"""Makes everything in jalign/demo/assets: data, tokenizer and pre-trained model.

    python scripts/make_demo_model.py                # all of it, about 8 minutes
    python scripts/make_demo_model.py --data-only    # only the JSONL files, a second

The data is written by the grammar of jalign/demo/task.py, and a rerun writes the same
files. The model is a LLaMA of 0.87M parameters, pre-trained on `base_documents` by
jalign's own training step; its weights are stored in float16.
"""

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
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
FACTS = (
    "The {thing} is {colour}.",
    "{name} lives near the {place}.",
    "{name} has a {animal}.",
    "There is a {colour} {thing} in the {place}.",
    "This is a story about {name} and the {colour} {thing}.",
)
# Chances under which about half of what the tuned model replies is what is wanted.
HAPPY_RATE, ON_TOPIC_RATE = 0.55, 0.98
# What is wrong off the topic: the person at least. A reward model sees that soon; a
# wrong thing with the right person it saw after 150 steps or after 400, by the seed.
WRONG_SLOTS = (("name",), ("name", "thing"))


def _fill(rng: random.Random, templates: Sequence[str], **fixed: str) -> str:
    """A random template with its slots filled, the given ones as given."""
    words = {slot: rng.choice(choices) for slot, choices in task.WORDS.items()} | fixed
    return rng.choice(templates).format(**words)


def _topic(rng: random.Random) -> dict[str, str]:
    return {slot: rng.choice(task.WORDS[slot]) for slot in ("name", "colour", "thing")}


def make_reply(
    rng: random.Random, topic: dict[str, str], *, on_topic: bool, happy: bool
) -> str:
    """A well-formed reply to a topic, with a leading space.

    Off the topic, the person, the thing or both are others, from the start or only in
    the ending.
    """
    topic = {slot: topic[slot] for slot in ("name", "colour", "thing")}
    ending = {slot: topic[slot] for slot in ("name", "thing")}
    if not on_topic:
        for slot in rng.choice(WRONG_SLOTS):
            ending[slot] = rng.choice([w for w in task.WORDS[slot] if w != topic[slot]])
        topic |= ending if rng.random() < 0.5 else {}
    events = list(
        dict.fromkeys(_fill(rng, task.EVENTS) for _ in range(rng.choice((1, 2))))
    )
    parts = [_fill(rng, task.OPENINGS, **topic), *events]
    return " " + " ".join(
        [*parts, _fill(rng, task.HAPPY if happy else task.SAD, **ending)]
    )


def sft_rows(seed: int, prompts: Sequence[str]) -> Iterator[dict[str, str]]:
    """A demonstration for each prompt; about half are what is wanted."""
    rng = random.Random(f"sft-{seed}")
    for prompt in prompts:
        on_topic, happy = rng.random() < ON_TOPIC_RATE, rng.random() < HAPPY_RATE
        topic = task.parse(prompt, "prompt") or {}
        reply = make_reply(rng, topic, on_topic=on_topic, happy=happy)
        yield {"prompt": prompt, "completion": reply}


def make_malformed(rng: random.Random, topic: dict[str, str]) -> str:
    """A reply that is wanted but for its form.

    It is unfinished, repetitive or rambling, its last full stop is missing, or a word
    is missing or too many: the tuned model's own slips. What the pairs do not show, PPO
    finds out, and is rewarded for.
    """
    reply = make_reply(rng, topic, on_topic=True, happy=True)
    kind = rng.random()
    if kind < 0.6:
        return reply[:-1] if kind < 0.1 else _slip(rng, reply)
    opening, event, *_, ending = re.findall(r" [^.]+\.", reply)
    fact = " " + _fill(rng, FACTS, **topic)
    faults = (
        [event],
        [ending],
        [" In the end.", ending],
        [event, event, ending],
        [fact, event, ending],
        [event] + 2 * [ending],
    )
    return opening + "".join(rng.choice(faults))


def _slip(rng: random.Random, reply: str) -> str:
    """The reply with a word left out, said twice, or put in from elsewhere."""
    words = reply.split()
    place = rng.randrange(len(words))
    stray = rng.choice(task.WORDS[rng.choice(list(task.WORDS))])
    word = words[place]
    words[place : place + 1] = rng.choice(([], [word, word], [stray, word]))
    return " " + " ".join(words)


def preference_rows(seed: int, prompts: Sequence[str]) -> Iterator[dict[str, str]]:
    """A wanted reply for each prompt, and one that fails by topic, ending or form."""
    rng = random.Random(f"preferences-{seed}")
    for prompt in prompts:
        topic = task.parse(prompt, "prompt") or {}
        chosen = make_reply(rng, topic, on_topic=True, happy=True)
        # The harder to see, the more pairs: topic, form, mood.
        (failure,) = rng.choices(("topic", "form", "mood"), (5, 3, 2))
        if failure == "form":
            rejected = make_malformed(rng, topic)
        else:
            on_topic, happy = failure != "topic", failure != "mood"
            rejected = make_reply(rng, topic, on_topic=on_topic, happy=happy)
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_prompts(seed: int, count: int, *, held_out: bool) -> list[str]:
    """Different prompts; those of the held-out side never occur on the other side."""
    rng, found = random.Random(f"prompts-{seed}-{held_out}"), {}
    while len(found) < count:
        topic = _topic(rng)
        person, thing = (task.WORDS[s].index(topic[s]) for s in ("name", "thing"))
        # Every tenth pair of a person and a thing is kept for the held-out side.
        if ((7 * person + thing) % 10 == 0) == held_out:
            found[task.PROMPTS[0].format(**topic)] = None
    return list(found)


def base_documents(seed: int) -> Iterator[str]:
    """Endless broader text for pre-training: facts and long, wandering stories.

    It holds every sentence of the language, and prompts with stories behind them, but
    stories that ramble, mix in facts, and end anywhere: what a reply looks like is left
    for supervised fine-tuning to teach.
    """
    rng = random.Random(f"base-{seed}")
    while True:
        topic, parts = _topic(rng), []
        if rng.random() < 0.5:
            parts.append(_fill(rng, (*task.PROMPTS, FACTS[-1]), **topic))
        for _ in range(rng.randint(1, 2)):
            parts.append(_fill(rng, task.OPENINGS, **topic))
            for _ in range(rng.randint(0, 4)):
                about_topic = rng.random() < 0.3
                parts.append(
                    _fill(rng, FACTS, **topic)
                    if about_topic
                    else _fill(rng, task.EVENTS)
                )
            ending = {slot: topic[slot] for slot in ("name", "thing")}
            parts.append(_fill(rng, task.HAPPY + task.SAD, **ending))
            if rng.random() < 0.2:
                topic = _topic(rng)
        yield " ".join(parts[: rng.randint(2, len(parts))])


def write_data(out: Path) -> None:
    """The prompts, preference pairs and demonstrations as JSONL files."""
    for held_out, part in enumerate(("train", "heldout")):
        count = max(PROMPTS[held_out], PAIRS[held_out], DEMONSTRATIONS[held_out])
        prompts = make_prompts(SEED, count, held_out=bool(held_out))
        demonstrations = prompts[: DEMONSTRATIONS[held_out]]
        files = {
            "prompts": [{"prompt": p} for p in prompts[: PROMPTS[held_out]]],
            "preferences": preference_rows(SEED, prompts[: PAIRS[held_out]]),
            "sft": sft_rows(SEED, demonstrations),
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
    texts = list(itertools.islice(base_documents(SEED + 1), 20_000))
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
    texts = itertools.islice(base_documents(SEED), args.documents)
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
