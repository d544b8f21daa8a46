"""Stopped and continued equals not stopped, bit for bit; signals save; NaN ends."""

import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jalign import data, sharding
from jalign.models import Model
from jalign.models.config import Experts, LayerKind
from jalign.train import objectives, optim, step
from jalign.train.checkpoint import Checkpointer
from jalign.train.loop import Diverged, SkipGuard, fit, row_namer
from jalign.train.metrics import MetricsWriter
from jalign.train.stop import Preempted
from tests.train import tiny

STEPS = 5


# Switches of other families in one: ALiBi, fused kernels, windows by layer, experts.
OTHERS = tiny.config(
    positions="alibi",
    qkv_layout="groups",
    norm="layer",
    norm_bias=True,
    layer_kinds=(LayerKind(4), LayerKind()),
    experts=Experts(3, 2, shared_size=16),
)
MODELS = {
    "alone": lambda: tiny.model(),
    "mesh": lambda: tiny.model(sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])),
    "others": lambda: Model(OTHERS),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def trainer(request):
    model = MODELS[request.param]()
    mesh = model.mesh
    tx, schedule = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-2), STEPS)
    abstract = step.abstract_state(model.param_shapes(), tx, mesh=mesh)
    pinned = mesh and sharding.state_shardings(mesh, abstract)
    step_fn = step.make_train_step(
        objectives.make_sft_objective(model),
        tx,
        microbatches=2,
        state_shardings=pinned,
        schedule=schedule,
    )

    def run(out, on_step=None, every=2):
        checkpointer = Checkpointer(out / "checkpoints")
        restored = checkpointer.restore({"state": abstract})
        if restored is None:
            state = step.init_state(model.init, tx, jax.random.key(3), mesh=mesh)
        else:
            state = restored.tree["state"]
        start = int(state.step)
        batches = data.make_loader(
            tiny.examples(30),
            batch_size=4,
            seed=1,
            collate=data.collate_tokens,
            max_length=16,
            start_step=start,
            steps=STEPS,
        )
        writer = MetricsWriter(out, total_steps=STEPS, start_step=start)
        try:
            return fit(
                state,
                step_fn,
                batches,
                steps=STEPS,
                writer=writer,
                checkpointer=checkpointer,
                checkpoint_every=every,
                mesh=mesh,
                on_step=on_step,
            )
        finally:
            writer.close()
            checkpointer.close()

    return run


class Killed(BaseException):
    pass


def kill_at(number, action):
    def on_step(done, state):
        del state
        if done == number:
            action()

    return on_step


def die():
    raise Killed


def test_continued_equals_uninterrupted(trainer, tmp_path):
    whole = trainer(tmp_path / "whole")
    assert int(whole.step) == STEPS
    # Dies without a word after step 3: the checkpoint of step 2 is the newest.
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", kill_at(3, die))
    assert tiny.same(whole, trainer(tmp_path / "killed"))
    # Asked to stop: saves at the very step, whatever checkpoint_every is.
    stop = kill_at(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="stopped at step 1"):
        trainer(tmp_path / "stopped", stop, every=0)
    assert Checkpointer(tmp_path / "stopped/checkpoints").steps() == [1]
    assert tiny.same(whole, trainer(tmp_path / "stopped"))
    # And once more, with nothing left to do.
    assert tiny.same(whole, trainer(tmp_path / "stopped"))
    lines = (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS


def test_each_step_is_a_sign_of_life_once_it_is_computed(
    trainer, tmp_path, monkeypatch
):
    finished, taken = [], []
    monkeypatch.setattr(sharding, "alive", finished.append)
    note = lambda step, _: taken.append((step, finished[-1:]))  # noqa: E731
    trainer(tmp_path, note, every=0)
    assert taken[:3] == [(1, []), (2, ["step 1"]), (3, ["step 2"])]
    assert finished == [f"step {n}" for n in range(1, STEPS)]


def test_signals_are_put_back(trainer, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer(tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_guard_stops_after_skips_in_a_row_only():
    guard = SkipGuard(limit=3)
    for number, skipped in enumerate([1, 1, 0, 1, 1]):
        guard.check({"step": number, "skipped": float(skipped)})
    guard.check(None)
    with pytest.raises(Diverged, match="3 steps in a row.*0 to 1, 3 to 5"):
        guard.check({"step": 5, "skipped": 1.0})


@pytest.mark.parametrize(
    ("skipped", "steps", "fails"),
    [
        ([], 1, False),
        ([1], 1, True),
        ([3], 10, False),
        ([10], 10, False),
        ([9, 10], 20, False),
        ([19, 20], 20, True),
        ([3, 5, 7, 9], 20, True),
    ],
)
def test_guard_fails_at_the_end_for_a_fifth_or_the_last_ones(skipped, steps, fails):
    guard = SkipGuard(skipped, names=lambda step: f"row {step}")
    if not fails:
        guard.finish(steps)
        assert guard.summary() == ({"skipped_steps": len(skipped)} if skipped else {})
        return
    match = f"{len(skipped)} of {steps} steps.*step {skipped[-1]}: row {skipped[-1]}"
    with pytest.raises(Diverged, match=match):
        guard.finish(steps)


def test_rows_of_a_step_are_named_by_origin_or_number():
    config = SimpleNamespace(batch_size=4, seed=1)
    examples = tiny.examples(3)
    rows = [data.Row({}, f"a.jsonl row {i}") for i in (1, 2, 4)]
    assert row_namer(rows, examples, config)(1) == (
        "a.jsonl row 1, a.jsonl row 2, a.jsonl row 4"
    )
    numbers = "example 1 of 3, example 2 of 3, example 3 of 3"
    assert row_namer(rows[:2], examples, config)(1) == numbers


def test_fit_ends_when_nothing_is_finite(tmp_path):
    def objective(params, batch, key):
        del key
        return objectives.Loss(jnp.sum(params["kernel"] * batch), jnp.float32(1), {})

    tx, _ = optim.make_optimizer(optim.OptimConfig(), 100)
    state = step.init_state({"kernel": jnp.ones(2)}, tx, jax.random.key(0))
    step_fn = step.make_train_step(objective, tx)
    writer = MetricsWriter(tmp_path, total_steps=100)
    bad = iter(lambda: jnp.full(2, jnp.nan), None)
    with pytest.raises(Diverged, match="1 to 10"):
        fit(state, step_fn, bad, steps=100, writer=writer)
    writer.close()
