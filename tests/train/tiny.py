"""A tiny model, tokenizer-free batches and hand-made optimizers for these tests."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from jalign import data, figures
from jalign.figures.notes import note_of
from jalign.models import Model, ModelConfig

VOCAB = 40
# Terms of the sums on the way to a log-probability: the norm, q, k, scores, their
# softmax over 16 positions, o, gate and down of two layers, then norm and vocabulary.
SUM_LENGTH = 2 * (32 + 32 + 8 + 16 + 32 + 32 + 32 + 48) + 32 + 32 + VOCAB


def config(**changes) -> ModelConfig:
    sizes = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tie_embeddings=True,
    )
    return dataclasses.replace(sizes, **changes)


def model(mesh=None, num_labels=0) -> Model:
    return Model(config(num_labels=num_labels), mesh)


def example(rng, low=4, high=14) -> data.Example:
    n = int(rng.integers(low, high))
    mask = np.arange(n) >= n // 2
    return data.Example(rng.integers(1, VOCAB, n).astype(np.int32), mask)


def examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [example(rng) for _ in range(n)]


def pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        data.PreferenceExample(example(rng), example(rng), 0.0, -20.0, -21.0)
        for _ in range(n)
    ]


def token_batch(n=8, length=16, seed=0):
    return data.collate_tokens(examples(n, seed), length)


def pair_batch(n=8, length=16, seed=0):
    return data.collate_preferences(pairs(n, seed), length)


def same(a, b) -> bool:
    def words(x):
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x)

    return jax.tree.all(
        jax.tree.map(lambda x, y: np.array_equal(words(x), words(y)), a, b)
    )


def ratio(pair):
    """A metric's (sum, count) as the number a reader sees."""
    return float(pair[0] / pair[1])


def unexplained(out: Path) -> list[str]:
    """The figures of a run's metrics on which figures/notes.py has no word."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curves = figures.curves_of([json.loads(line) for line in lines])
    names = [figure.name for figure in figures.merge_related(curves)]
    return [name for name in names if not note_of(name).sentence]
