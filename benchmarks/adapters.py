"""`python -m benchmarks.adapters [MODEL] [STEPS]`: a step of adapters and a full one.

Both SFT steps of the same random rows, in turn, in one process. Prints the compiler's
arguments and temporaries of each, and the medians of the ratios.
"""

import sys
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jalign as ja
from benchmarks import measure, settings
from benchmarks.worker_jalign import make_step

PIECES = "sft", "lora-sft"
MIB = 2**20


def compiled_steps(name: str) -> dict[str, Any]:
    """Piece -> (its compiled step, its first arguments)."""
    shape = settings.MODELS[name]
    config = ja.models.ModelConfig(
        **shape._asdict(), head_dim=shape.head_dim, tie_embeddings=True
    )
    model = ja.models.Model(config)
    size = settings.ROWS, settings.LENGTH
    rows = np.random.default_rng(0).integers(0, config.vocab_size, size, np.int32)
    examples = [ja.data.Example(row, np.ones(row.size, bool)) for row in rows]
    batch = jax.device_put(ja.data.collate_tokens(examples, settings.LENGTH))
    params, steps = model.init(jax.random.key(0)), {}
    for piece in PIECES:
        objective = ja.train.make_sft_objective(model)
        start = jax.tree.map(jnp.copy, params)  # a full step donates its own
        step, state = make_step(piece, objective, start, model)
        args = state, batch, step.keywords["frozen"]
        steps[piece] = step.func.lower(*args).compile(), args  # pyright: ignore
    return steps


def spans_of(steps: dict[str, Any], count: int) -> dict[str, measure.Spans]:
    """Of `count` steps of each piece, after one that is not timed."""
    states = {piece: args[0] for piece, (_, args) in steps.items()}
    found: dict[str, Any] = {piece: ([], []) for piece in steps}
    for number in range(count + 1):
        for piece, (step, args) in steps.items():
            start = measure.now()
            states[piece], metrics = step(states[piece], *args[1:])
            jax.block_until_ready(metrics)
            if number:
                span = np.subtract(measure.now(), start)
                for times, taken in zip(found[piece], span, strict=True):
                    times.append(float(taken))
    return {piece: measure.Spans(*times) for piece, times in found.items()}


def main() -> None:
    """Prints a line a piece, and one of ratios."""
    name = sys.argv[1] if len(sys.argv) > 1 else "7m"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else settings.TIMED_STEPS
    ja.sharding.give_back_compiler_memory()
    steps, sizes = compiled_steps(name), {}
    for piece, (step, _) in steps.items():
        memory = step.memory_analysis()
        both = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        sizes[piece] = sum(both)
        texts = (f"{size / MIB:,.0f}" for size in both)
        print(f"{name} {piece}: arguments {next(texts)}, temporaries {next(texts)} MiB")
    full, small = spans_of(steps, count).values()
    for kind in measure.Spans._fields:
        pairs = zip(getattr(small, kind), getattr(full, kind), strict=True)
        print(f"{kind}: {median(a / b for a, b in pairs):.3f} of a full step")
    print(f"memory: {sizes['lora-sft'] / sizes['sft']:.3f} of a full step")


if __name__ == "__main__":
    main()
