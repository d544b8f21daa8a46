"""`python -m benchmarks.long_rows [LENGTH ...]`: memory and time of one long row.

An SFT step of 1 x LENGTH tokens of the 7M model, a process a length, blocks recomputed
in the backward pass. Prints the compiler's temporaries and the peak of the process.
"""

import json
import subprocess
import sys
import time

import jax
import numpy as np

import jalign as ja
from benchmarks import measure, settings


def one_step(length: int) -> dict[str, float]:
    """Of one step, compiled before the clock starts."""
    shape = settings.MODELS["7m"]._asdict()
    size = settings.MODELS["7m"].head_dim
    config = ja.models.ModelConfig(**shape, head_dim=size, tie_embeddings=True)
    model = ja.models.Model(config, remat=True)
    tx, _ = ja.train.make_optimizer(ja.train.OptimConfig(learning_rate=1e-4), 10)
    state = ja.train.init_state(model.init(jax.random.key(0)), tx, jax.random.key(0))
    step = ja.train.make_train_step(ja.train.make_sft_objective(model), tx)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, length)
    example = ja.data.Example(tokens.astype(np.int32), np.arange(length) > 0)
    batch = jax.device_put(ja.data.collate_tokens([example], length))
    before, start = measure.rss_mib(), time.perf_counter()
    compiled = step.lower(state, batch).compile()  # pyright: ignore
    compile_seconds = time.perf_counter() - start
    start = time.perf_counter()
    _, metrics = compiled(state, batch)
    loss = float(metrics["loss"])
    seconds = time.perf_counter() - start
    mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return {
        "tokens": length,
        "temporaries_mib": mib,
        "temporaries_bytes_a_token": mib * 2**20 / length,
        "peak_mib": measure.rss_mib(),
        "peak_before_mib": before,
        "compile_s": compile_seconds,
        "step_s": seconds,
        "loss": loss,
    }


def main() -> None:
    """Prints a JSON line a length."""
    lengths = sys.argv[1:] or ["4096", "8192", "16384", "32768"]
    if len(lengths) == 1:
        print(json.dumps({k: round(v, 2) for k, v in one_step(int(*lengths)).items()}))
        return
    for length in lengths:
        command = [sys.executable, "-m", "benchmarks.long_rows", length]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
