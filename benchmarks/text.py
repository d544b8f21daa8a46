"""Text to train on: AlpacaEval's judged pairs where they lie beside the checkout, else
generated sentences whose lengths are distributed alike."""

import json
from pathlib import Path

import numpy as np

from benchmarks.settings import ROOT

ALPACA = ROOT.parent / "shared" / "data" / "alpaca_eval_preferences_train.jsonl"
# Of AlpacaEval: log of the number of words, mean and deviation.
PROMPT_WORDS, REPLY_WORDS = (2.8, 0.8), (4.9, 0.8)


def load_pairs(count: int = 1500) -> tuple[list[dict[str, str]], str]:
    """(rows with prompt, chosen and rejected, where they come from).

    A prompt ends in a newline, so that it tokenizes the same with and without a reply.
    """
    if ALPACA.exists():
        return _alpaca(ALPACA, count), "AlpacaEval preference pairs"
    return _generated(count), "generated pairs with AlpacaEval's lengths"


def _alpaca(path: Path, count: int) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    # Neighbours share an instruction: a stride spreads the sources.
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [
        {
            "prompt": f"Question: {rows[i]['prompt'][0]['content'].strip()}\nAnswer:\n",
            "chosen": rows[i]["chosen"][0]["content"].strip(),
            "rejected": rows[i]["rejected"][0]["content"].strip(),
        }
        for i in order
    ]


def _generated(count: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    words = _lexicon(rng, 20_000)
    # Zipf's law, as in natural text: a word's frequency falls with its rank.
    weights = 1.0 / np.arange(2, len(words) + 2)
    heights = np.cumsum(weights / weights.sum())

    def sentence(mean: float, deviation: float) -> str:
        length = int(np.clip(np.exp(rng.normal(mean, deviation)), 3, 600))
        picked = np.searchsorted(heights[:-1], rng.random(length))
        return " ".join(words[i] for i in picked) + "."

    return [
        {
            "prompt": f"Question: {sentence(*PROMPT_WORDS)}\nAnswer:\n",
            "chosen": sentence(*REPLY_WORDS),
            "rejected": sentence(*REPLY_WORDS),
        }
        for _ in range(count)
    ]


def _lexicon(rng: np.random.Generator, count: int) -> list[str]:
    """Pronounceable words of two to eight letters."""
    shape = (count, 4)
    first = rng.choice(list("bcdfghklmnprstvw"), shape)
    second = rng.choice(list("aeiou"), shape)
    lengths = 2 * rng.integers(1, 5, count)
    letters = np.stack([first, second], axis=-1).reshape(count, 8)
    return ["".join(row[:n]) for row, n in zip(letters, lengths, strict=True)]
