"""The blocks of docs/papers.md run, one after the other, on arrays of these names."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jalign as ja

PAGE = Path(__file__).resolve().parents[2] / "docs" / "papers.md"
B, T, E, D = 4, 3, 2, 5
RNG = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(-RNG.random(shape), jnp.float32)


def names():
    mask = jnp.asarray(np.arange(T) < np.array([[3], [1], [2], [3]]))
    return {
        "ja": ja,
        "jax": jax,
        "jnp": jnp,
        "logps": [floats(B) for _ in range(4)],
        "pair_mask": jnp.array([True, True, True, False]),
        "chosen_mask": mask,
        "rejected_mask": mask[::-1],
        "chosen_token_logps": floats(B, T),
        "collision_entropy": -floats(B, T),
        "mismatched_logps": floats(B),
        "ref_mismatched_logps": floats(B),
        "desirable": jnp.array([True, False, True, False]),
        "rewards": floats(B, 2),
        "sample_logps": floats(B, 2),
        "ref_sample_logps": floats(B, 2),
        "params": {"w": floats(3)},
        "ref_params": {"w": floats(3)},
        "step": 512,
        "heads": floats(E, D),
        "chosen_hidden": floats(B, D),
        "rejected_hidden": floats(B, D),
    }


def test_every_block_runs_and_gives_finite_losses():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 7
    space = names()
    for block in blocks:
        exec(block, space)
        for leaf in jax.tree.leaves(space["loss"]):
            assert np.all(np.isfinite(leaf)), block
    assert space["loss"].shape == (E, B) and space["cautious"].shape == (B,)
