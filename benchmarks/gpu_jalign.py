"""jalign's share of benchmarks.gpu."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jalign as ja
from benchmarks import measure
from benchmarks.gpu import TIMED, WARM
from benchmarks.settings import Shape


def has_device(kind: str) -> bool:
    """Whether jax runs on a "gpu" (or "cpu")."""
    return jax.default_backend() == kind


def make_model(shape: Shape, device: str):
    """(bfloat16 model, float32 random parameters)."""
    config = ja.models.ModelConfig(
        **shape._asdict(),
        head_dim=shape.head_dim,
        tie_embeddings=True,
        max_position=4096,
    )
    dtype = jnp.bfloat16 if device == "gpu" else jnp.float32
    model = ja.models.Model(config, dtype=dtype)
    return model, model.init(jax.random.key(0))


def documents(shape: Shape, rows: int, length: int) -> list[ja.data.Example]:
    """Random full rows, trained on everywhere."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, shape.vocab_size, (rows, length)).astype(np.int32)
    return [ja.data.Example(row, np.ones(length, bool)) for row in ids]


def sft(shape: Shape, size: dict[str, int], device: str) -> dict[str, Any]:
    """Full rows."""
    model, params = make_model(shape, device)
    examples = documents(shape, size["rows"], size["length"])
    batch = ja.data.collate_tokens(examples, size["length"])
    objective = ja.train.make_sft_objective(model)
    return timed(train(objective, params, lambda: batch))


def dpo(shape: Shape, size: dict[str, int], device: str) -> dict[str, Any]:
    """Pairs of full rows, with the reference's pass in every step."""
    model, reference = make_model(shape, device)
    examples = documents(shape, 2 * size["rows"], size["length"])
    sides = zip(examples[::2], examples[1::2], strict=True)
    pairs = [ja.data.PreferenceExample(*pair) for pair in sides]
    batch = ja.data.collate_preferences(pairs, size["length"])
    reference_logps = ja.train.make_reference_fn(model)

    def with_reference():
        chosen, rejected = reference_logps(reference, batch)
        return batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    objective = ja.train.make_dpo_objective(model, beta=0.1)
    return timed(train(objective, jax.tree.map(jnp.copy, reference), with_reference))


def sample(shape: Shape, size: dict[str, int], device: str) -> dict[str, Any]:
    """No stop token: every row runs to the limit."""
    model, params = make_model(shape, device)
    rows = documents(shape, size["rows"], size["prompt"])
    prompts = [row.tokens for row in rows]

    def calls():
        for number in range(WARM + TIMED):
            completion = ja.generate.generate(
                model,
                params,
                prompts,
                key=jax.random.key(number),
                max_new_tokens=size["new"],
            )
            yield ja.generate.to_host(completion)

    return timed(calls())


def train(objective, params, make_batch):
    """Yields the loss of each step."""
    tx, schedule = ja.train.make_optimizer(ja.train.OptimConfig(), WARM + TIMED)
    state = ja.train.init_state(params, tx, jax.random.key(0))
    step = ja.train.make_train_step(objective, tx, schedule=schedule)
    for _ in range(WARM + TIMED):
        state, metrics = step(state, make_batch())
        yield float(metrics["loss"])


def timed(steps) -> dict[str, Any]:
    """Seconds of each step, the device's name and its peak memory in bytes."""
    spans, _ = measure.laps(steps)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "seconds": spans.seconds,
        "device": device.device_kind,
        "peak": stats.get("peak_bytes_in_use"),
    }


PIECES = {"sft": sft, "dpo": dpo, "sample": sample}
