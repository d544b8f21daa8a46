"""Attention alone on one GPU: forward and backward of each path, and torch's SDPA.

    python -m benchmarks.gpu_attention

Rows of a LLaMA of 1B in bfloat16. Each path is first held to the plain one, in float32.
torch is timed where the same Python has it. `--dry-run` takes small arrays on the CPU,
without the GPU's kernel.
"""

import argparse
import os
import sys
import time

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


def row_of(kind: str, path: str, segments, rows: int, length: int) -> str:
    """Times one path and compares it with the plain one."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, out = (
        jax.random.normal(key, (rows, length, n, HEAD_DIM), jnp.bfloat16)
        for key, n in zip(keys, heads, strict=True)
    )
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    segments = None if segments is None else jnp.asarray(segments)
    counts = jnp.ones((rows, length), bool) if segments is None else segments > 0
    out = jnp.where(counts[..., None, None], out, 0)

    def run(implementation, q, k, v):
        return attend(
            q,
            k,
            v,
            q_positions=positions,
            kv_positions=positions,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            implementation=implementation,
        )

    def both(implementation):
        def fn(q, k, v):
            y, back = jax.vjp(lambda *x: run(implementation, *x), q, k, v)
            return y, back(out.astype(y.dtype))

        return jax.jit(fn)

    def error():
        few = 2  # rows: plain attention keeps all scores

        def norms(x, y):
            x = x.astype(jnp.float32)
            return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

        y, grads = both(path)(q, k, v)
        exact_y, exact_grads = [], []
        for i in range(0, rows, few):
            part = slice(i, i + few)
            mine = None if segments is None else segments[part]
            y32, back = jax.vjp(
                lambda *x, part=part, mine=mine: attend(
                    *x,
                    q_positions=positions[part],
                    kv_positions=positions[part],
                    q_segment_ids=mine,
                    kv_segment_ids=mine,
                    implementation="plain",
                ),
                *(x[part].astype(jnp.float32) for x in (q, k, v)),
            )
            exact_y.append(y32)
            exact_grads.append(back(out[part].astype(jnp.float32)))
        y, exact = (
            jnp.where(counts[..., None, None], x, 0)
            for x in (y, jnp.concatenate(exact_y))
        )
        gaps = [norms(y, exact)]
        for grad, parts in zip(grads, zip(*exact_grads, strict=True), strict=True):
            gaps.append(norms(grad, jnp.concatenate(parts)))
        return max(gaps)

    gap = error()
    forward = clock(jax.jit(lambda *x: run(path, *x)), (q, k, v))
    whole = clock(both(path), (q, k, v))
    return f"| {kind} | {path} | {forward:.2f} | {whole:.2f} | {gap:.1e} |"


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
