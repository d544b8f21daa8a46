"""The least time that a step can take: its matrix products at this machine's rate.

Only matrix products are counted, with the causal half of attention, on useful tokens,
and nothing twice: no padding, no rematerialization, no optimizer. With P the weights of
the layers' matrices, L (2 D^2 H-shares + 3 D F) as below, a forward pass of a row of T
tokens of which S are predicted takes

    2 T P  +  2 S V D  +  L * 4 N H * T (T + 1) / 2       FLOP,

and forward with backward three times that.
"""

import json
import sys
import time
from typing import Any

from benchmarks import settings
from benchmarks.settings import Shape


def layer_weights(shape: Shape) -> int:
    """Entries of the matrices of all layers: q and o, k and v, and the three of F."""
    d, h = shape.hidden_size, shape.head_dim
    attention = 2 * d * h * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * (attention + 3 * d * shape.intermediate_size)


def forward_flops(shape: Shape, tokens: int, predicted: int) -> float:
    """Of one row: T tokens, of which `predicted` need logits over the vocabulary."""
    pairs = tokens * (tokens + 1) / 2  # a query and a key at or before it
    attention = shape.num_layers * 4 * shape.num_heads * shape.head_dim * pairs
    unembed = 2.0 * predicted * shape.vocab_size * shape.hidden_size
    return 2.0 * tokens * layer_weights(shape) + unembed + attention


def step_flops(piece: str, shape: Shape, rows: dict[str, Any]) -> float | None:
    """Of a step, on average over the warm steps' rows; None where no floor is known.

    A DPO step is forward and backward of the policy and forward of the reference; a
    sampler's time is that of reading weights, which this does not describe.
    """
    if piece == "sft":
        per_row = forward_flops(shape, settings.LENGTH, settings.LENGTH - 1)
        return 3 * settings.ROWS * per_row
    if piece not in ("dpo", "reward"):
        return None
    total = sum(_pair_flops(piece, shape, pair) for pair in rows["pairs"])
    passes = 4 if piece == "dpo" else 3
    return passes * total * settings.ROWS / len(rows["pairs"])


def _pair_flops(piece: str, shape: Shape, pair: dict[str, Any]) -> float:
    sides = (len(pair["chosen_ids"]), len(pair["rejected_ids"]))
    prompt = len(pair["prompt_ids"])
    return sum(
        forward_flops(shape, prompt + side, side if piece == "dpo" else 0)
        for side in sides
    )


def matmul_rate(size: int = 2048, repeats: int = 12) -> float:
    """FLOP/s of jax's float32 [size, size] product here: the best of some."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(a, a).block_until_ready()

    def seconds() -> float:
        start = time.perf_counter()
        multiply(a, a).block_until_ready()
        return time.perf_counter() - start

    return 2.0 * size**3 / min(seconds() for _ in range(repeats))


if __name__ == "__main__":
    print(json.dumps({"flops_per_second": matmul_rate()}))
    sys.exit(0)
