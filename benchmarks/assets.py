"""Everything that the workers read, written once to build/bench/MODEL: checkpoints in
HF format and rows as text and as token ids. Runs in jalign's environment."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import settings, text
from benchmarks.settings import BUILD, MODELS, Shape

VERSION = 4  # of what is written; a change here writes it anew


# The texts of a run that is timed from its start: file -> column of a pair -> its name.
COLD_COLUMNS = {
    "cold-pairs.jsonl": {k: k for k in ("prompt", "chosen", "rejected")},
    "cold-sft.jsonl": {"prompt": "prompt", "chosen": "completion"},
}


def folder(model: str) -> Path:
    """Where the checkpoints and rows of a model lie: model/, reward/, chain/."""
    return BUILD / model


def read_rows(model: str) -> dict[str, Any]:
    """What `ensure` wrote: sft, pairs, prompts, early_prompts, early_lengths, ..."""
    return json.loads((folder(model) / "rows.json").read_text("utf-8"))


def ensure(model: str) -> None:
    """Writes the assets of a model unless this version of them is there."""
    path = folder(model) / "rows.json"
    if path.exists() and read_rows(model)["version"] == VERSION:
        return
    shape = MODELS[model]
    pairs, source = text.load_pairs()
    tokenizer = train_tokenizer(pairs, shape.vocab_size)
    write_checkpoints(model, shape, tokenizer)
    rows = make_rows(pairs, tokenizer, shape)
    rows |= {"version": VERSION, "source": source, "eos": tokenizer.eos_token_id}
    prompts = [{"prompt": text} for text in rows["questions"]]
    write_lines(folder(model) / "prompts.jsonl", prompts)
    fitting = pair_rows(pairs, tokenizer, settings.ROWS * settings.COLD_STEPS)
    for name, names in COLD_COLUMNS.items():
        cold = [{names[k]: row[k] for k in names} for row in fitting]
        write_lines(folder(model) / name, cold)
    path.write_text(json.dumps(rows), "utf-8")


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def train_tokenizer(pairs: list[dict[str, str]], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer of at most vocab_size tokens, without BOS."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[settings.PAD, settings.EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((x for pair in pairs for x in pair.values()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=settings.EOS, pad_token=settings.PAD
    )


def write_checkpoints(model: str, shape: Shape, tokenizer: Any) -> None:
    """model/ random, reward/ with a scalar head, chain/ for `chain_params`."""
    import jax

    import jalign as ja

    config = ja.models.ModelConfig(
        **shape._asdict(),
        head_dim=shape.head_dim,
        # Tunix's LLaMA 3 rotates by this base whatever its config says.
        rope_theta=1_000_000.0,
        tie_embeddings=True,
        eos_token_ids=(tokenizer.eos_token_id,),
        pad_token_id=tokenizer.pad_token_id,
    )
    lm = ja.models.Model(config)
    params = lm.init(jax.random.key(0))
    ja.models.save(folder(model) / "model", lm, params, tokenizer)
    scored = ja.models.add_scalar_head(lm, params, key=jax.random.key(1))
    ja.models.save(folder(model) / "reward", *scored, tokenizer)
    untied = lm.replace(config=dataclasses.replace(config, tie_embeddings=False))
    params = chain_params(untied.init(jax.random.key(0)), tokenizer.eos_token_id)
    ja.models.save(folder(model) / "chain", untied, params, tokenizer)


def chain(vocab_size: int, eos: int) -> np.ndarray:
    """The order in which the chain model counts through its vocabulary, EOS last."""
    order = np.random.default_rng(0).permutation(vocab_size)
    return np.append(order[order != eos], eos)


def chain_params(params: dict[str, Any], eos: int) -> dict[str, Any]:
    """Weights that follow each token by the next one of `chain` with probability ~ 1.

    The last token of a prompt then fixes the length of its completion, in every
    framework and at any temperature, while the work stays that of sampling. The
    embedding outweighs what the blocks add, and the unembedding of a token is the
    embedding of the one before: its logit is D/4, others' have deviation sqrt(D)/4.
    """
    size, width = params["embed"]["embedding"].shape
    order = chain(size, eos)
    embedding = np.random.default_rng(1).normal(size=(size, width)).astype(np.float32)
    unembed = np.zeros((width, size), np.float32)
    unembed[:, order[1:]] = embedding[order[:-1]].T / 4
    return params | {
        "embed": {"embedding": embedding},
        "unembed": {"kernel": unembed},
    }


def make_rows(pairs: list[dict[str, str]], tokenizer: Any, shape: Shape) -> dict:
    """The rows of all pieces; the counts are those of the warm steps."""
    count = settings.ROWS * settings.WARM_STEPS
    lengths = early_lengths()
    return {
        "sft": sft_rows(pairs, tokenizer, count),
        "pairs": pair_rows(pairs, tokenizer, count),
        "prompts": prompt_rows(shape.vocab_size, settings.EARLY_ROWS),
        "early_prompts": early_prompts(
            shape.vocab_size, tokenizer.eos_token_id, lengths
        ),
        "early_lengths": lengths,
        "questions": question_rows(pairs, tokenizer, settings.QUESTIONS),
    }


def sft_rows(pairs, tokenizer, count: int) -> list[list[int]]:
    """Documents behind each other, cut into full rows: no padding anywhere."""
    ids: list[int] = []
    for pair in pairs:
        document = pair["prompt"] + pair["chosen"] + settings.EOS
        ids += tokenizer.encode(document)
        if len(ids) >= count * settings.LENGTH:
            break
    rows = np.resize(np.array(ids), (count, settings.LENGTH))
    return rows.tolist()


def pair_rows(pairs, tokenizer, count: int) -> list[dict[str, Any]]:
    """The first pairs of which both sides fit, with their ids, EOS included."""
    rows = []
    for pair in pairs:
        ids = {"prompt_ids": tokenizer.encode(pair["prompt"])}
        for side in ("chosen", "rejected"):
            ids[f"{side}_ids"] = tokenizer.encode(pair[side] + settings.EOS)
        longest = max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        if len(ids["prompt_ids"]) + longest <= settings.LENGTH:
            rows.append(pair | ids)
        if len(rows) == count:
            return rows
    raise ValueError(f"only {len(rows)} of {count} pairs fit {settings.LENGTH} tokens")


def question_rows(pairs, tokenizer, count: int) -> list[str]:
    """Prompts of at most PROMPT_LENGTH tokens, as text: what online runs start from."""
    prompts = dict.fromkeys(pair["prompt"] for pair in pairs)
    limit = settings.PROMPT_LENGTH
    short = [text for text in prompts if len(tokenizer.encode(text)) <= limit]
    if len(short) < count:
        raise ValueError(f"only {len(short)} of {count} prompts have {limit} tokens")
    return short[:count]


def prompt_rows(vocab_size: int, count: int) -> list[list[int]]:
    """Random tokens, special ones left out."""
    rng = np.random.default_rng(2)
    return rng.integers(2, vocab_size, (count, settings.PROMPT_LENGTH)).tolist()


def early_lengths() -> list[int]:
    """Completion lengths with the stop token: geometric, as a constant chance to stop
    gives, cut at the limit and shifted to the mean that settings ask for."""
    rng, rows = np.random.default_rng(3), settings.EARLY_ROWS
    lengths = rng.geometric(1 / settings.EARLY_MEAN, rows).clip(1, settings.NEW_TOKENS)
    target = rows * settings.EARLY_MEAN
    while (gap := target - int(lengths.sum())) != 0:
        row = int(rng.integers(rows))
        lengths[row] = np.clip(lengths[row] + np.sign(gap), 1, settings.NEW_TOKENS)
    return lengths.tolist()


def early_prompts(vocab_size: int, eos: int, lengths: list[int]) -> list[list[int]]:
    """Prompts whose last token stands `length` places before the end of the chain."""
    order = chain(vocab_size, eos)
    prompts = prompt_rows(vocab_size, len(lengths))
    last = [int(order[-1 - length]) for length in lengths]
    return [[*p[:-1], token] for p, token in zip(prompts, last, strict=True)]
