"""Attention alone on one GPU: forward and backward of each path, and torch's SDPA.

    python -m benchmarks.gpu_attention

Rows of a LLaMA of 1B in bfloat16. Each path is first held to the plain one, in float32.
torch is timed where the same Python has it. `--dry-run` takes small arrays on the CPU,
without the GPU's kernel.
"""

import argparse
import functools
import os
import sys
import time
from typing import NamedTuple

# Before jax starts: torch needs memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from jalign.models.attention import attend

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 8, 2048, 32, 8, 64
CALLS = 20


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_attention")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU")
    dry_run = parser.parse_args().dry_run
    if not dry_run and jax.default_backend() != "gpu":
        print("benchmarks.gpu_attention: jax sees no GPU", file=sys.stderr)
        return 2
    rows, length = (2, 256) if dry_run else (ROWS, LENGTH)
    print(f"{jax.devices()[0].device_kind}, {rows} rows of {length} tokens")
    print("| rows | path | forward, ms | forward and backward, ms | error |")
    print("|---|---|---|---|---|")
    for kind, segments in layouts(rows, length).items():
        for path in ("blocked",) if dry_run else ("cudnn", "blocked"):
            print(row_of(kind, path, segments, rows, length), flush=True)
    if not dry_run:
        print(torch_row(rows, length))
    return 0


def layouts(rows: int, length: int) -> dict[str, np.ndarray | None]:
    """Segment ids of rows that are whole, padded, and packed."""
    places = np.arange(length)
    used = np.linspace(length // 4, length, rows).astype(int)[:, None]
    packed = np.tile(1 + places * 4 // length, (rows, 1))
    return {
        "whole": None,
        "padded": (places < used).astype(np.int32),
        "packed": packed.astype(np.int32),
    }


class Rows(NamedTuple):
    """Arguments of attention, and the gradient of its output; B rows of T tokens."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    positions: jax.Array
    segments: jax.Array | None

    @property
    def counted(self) -> jax.Array:
        """bool [B, T, 1, 1], False at padding."""
        if self.segments is None:
            return jnp.ones((*self.positions.shape, 1, 1), bool)
        return (self.segments > 0)[..., None, None]

    def part(self, rows: slice) -> "Rows":
        """Some of the rows, in float32."""
        few = jax.tree.map(lambda x: x[rows], self)
        wide = (x.astype(jnp.float32) for x in few[:4])
        return Rows(*wide, few.positions, few.segments)


def make_rows(segments: np.ndarray | None, rows: int, length: int) -> Rows:
    """Random ones in bfloat16; padding has no gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, d_out = (
        jax.random.normal(key, (rows, length, n, HEAD_DIM), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    ids = None if segments is None else jnp.asarray(segments)
    result = Rows(q, k, v, d_out, positions, ids)
    return result._replace(d_out=jnp.where(result.counted, d_out, 0))


@functools.partial(jax.jit, static_argnums=0)
def forward(path: str, rows: Rows) -> jax.Array:
    return attend(
        *rows[:3],
        q_positions=rows.positions,
        kv_positions=rows.positions,
        q_segment_ids=rows.segments,
        kv_segment_ids=rows.segments,
        implementation=path,
    )


@functools.partial(jax.jit, static_argnums=0)
def forward_and_backward(path: str, rows: Rows) -> list[jax.Array]:
    """The output where it counts, and the gradients of q, k and v."""
    y, back = jax.vjp(
        lambda *qkv: forward(path, Rows(*qkv, *rows[3:])), rows.q, rows.k, rows.v
    )
    return [jnp.where(rows.counted, y, 0), *back(rows.d_out.astype(y.dtype))]


def error(path: str, rows: Rows) -> float:
    """The largest relative error of output and gradients, by their norms."""
    few = 2  # rows at once, for the plain path keeps all scores
    parts = [
        forward_and_backward("plain", rows.part(slice(i, i + few)))
        for i in range(0, len(rows.q), few)
    ]

    def gap(x, y):
        return float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))

    exact = map(jnp.concatenate, zip(*parts, strict=True))
    return max(map(gap, forward_and_backward(path, rows), exact))


def row_of(kind: str, path: str, segments, rows: int, length: int) -> str:
    """Compares one path with the plain one, and times it."""
    args = make_rows(segments, rows, length)
    gap = error(path, args)
    one = clock(lambda x: forward(path, x), (args,))
    both = clock(lambda x: forward_and_backward(path, x), (args,))
    return f"| {kind} | {path} | {one:.2f} | {both:.2f} | {gap:.1e} |"


def clock(fn, args) -> float:
    """Milliseconds of a call, the mean of CALLS behind each other."""
    jax.block_until_ready(fn(*args))
    start = time.perf_counter()
    for _ in range(CALLS):
        result = fn(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / CALLS * 1e3


def torch_row(rows: int, length: int) -> str:
    """torch's scaled_dot_product_attention on whole rows."""
    try:
        import torch
    except ImportError:
        return "| whole | torch SDPA | – | – | not installed |"
    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (
        torch.randn(
            rows, n, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
        ).requires_grad_()
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    out = torch.randn_like(q)

    def forward():
        return attention(q, k, v, is_causal=True, enable_gqa=True)

    def span(call):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / CALLS * 1e3

    with torch.no_grad():
        alone = span(forward)
    whole = span(lambda: torch.autograd.grad(forward(), (q, k, v), out))
    return f"| whole | torch SDPA | {alone:.2f} | {whole:.2f} | |"


if __name__ == "__main__":
    sys.exit(main())
