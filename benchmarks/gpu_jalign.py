"""jalign's share of benchmarks.gpu."""

import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jalign as ja
from benchmarks import measure
from benchmarks.gpu import PACKED, TIMED, WARM
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


def sft(shape: Shape, size: dict[str, int], device: str, **options) -> dict[str, Any]:
    """Full rows."""
    model, params = make_model(shape, device)
    batch = ja.data.collate_tokens(
        documents(shape, size["rows"], size["length"]), size["length"]
    )
    objective = ja.train.make_sft_objective(model)
    return timed(train(objective, params, lambda: batch), **options)


def packed(
    shape: Shape, size: dict[str, int], device: str, **options
) -> dict[str, Any]:
    """Full rows of PACKED equal documents."""
    model, params = make_model(shape, device)
    count, length = size["rows"] * PACKED, size["length"] // PACKED
    parts = documents(shape, count, length)
    rows = [parts[i : i + PACKED] for i in range(0, count, PACKED)]
    batch = ja.data.collate_tokens(rows, size["length"])
    objective = ja.train.make_sft_objective(model)
    return timed(train(objective, params, lambda: batch), **options)


def dpo(shape: Shape, size: dict[str, int], device: str, **options) -> dict[str, Any]:
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
    params = jax.tree.map(jnp.copy, reference)
    return timed(train(objective, params, with_reference), **options)


def sample(
    shape: Shape, size: dict[str, int], device: str, **options
) -> dict[str, Any]:
    """No stop token: every row runs to the limit. bfloat16 weights, as for serving."""
    model, params = make_model(shape, device)
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    rows = documents(shape, size["rows"], size["prompt"])
    prompts = [row.tokens for row in rows]

    def calls():
        for number in range(WARM + TIMED + 1):
            completion = ja.generate.generate(
                model,
                params,
                prompts,
                key=jax.random.key(number),
                max_new_tokens=size["new"],
            )
            yield ja.generate.to_host(completion)

    return timed(calls(), **options)


def train(objective, params, make_batch):
    """Yields the loss of each step."""
    tx, schedule = ja.train.make_optimizer(ja.train.OptimConfig(), WARM + TIMED + 1)
    state = ja.train.init_state(params, tx, jax.random.key(0))
    step = ja.train.make_train_step(objective, tx, schedule=schedule)
    for _ in range(WARM + TIMED + 1):
        state, metrics = step(state, make_batch())
        yield float(metrics["loss"])


def timed(steps: Iterator[Any], profile: bool) -> dict[str, Any]:
    """Seconds of each step, the device's name, its peak memory in bytes; with
    `profile` the longest operations of one step more."""
    spans, _ = measure.laps(next(steps) for _ in range(WARM + TIMED))
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    result = {
        "seconds": spans.seconds,
        "device": device.device_kind,
        "peak": stats.get("peak_bytes_in_use"),
    }
    return result | ({"top": longest(lambda: next(steps))} if profile else {})


def longest(run: Callable[[], Any], count: int = 10) -> list[tuple[str, float, int]]:
    """[(operation, milliseconds, calls)] of what the device did meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    lines = [x for p in planes if p.name.startswith("/device:GPU") for x in p.lines]
    lines = [x for x in lines if x.name.startswith("Stream")]
    if not lines:
        host = next(p for p in planes if p.name == "/host:CPU")
        lines = [x for x in host.lines if x.name.startswith("tf_XLA")]
    spent, calls = collections.Counter(), collections.Counter()
    for event in (event for line in lines for event in line.events):
        spent[event.name] += event.duration_ns / 1e6
        calls[event.name] += 1
    return [(name, ms, calls[name]) for name, ms in spent.most_common(count)]


PIECES = {"sft": sft, "packed": packed, "dpo": dpo, "sample": sample}
