"""A signal at any phase of a run: exit 75, nothing lost, the same weights."""

import os
import signal

import pytest

from jalign.train import loop, offline, recipe
from jalign.train.stop import Preempted, StopSignal
from tests.train import world


def stop_in(monkeypatch, module, name, number=1, how=signal.SIGTERM):
    """The number-th call of module.name is met by a signal, then goes on."""
    real, calls = getattr(module, name), []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), how)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, stopped)


PHASES = [
    (offline.data, "load_rows", 1),
    (offline, "load_pretrained", 1),
    (offline, "reference_examples", 1),
    (offline, "measure", 1),
    (loop.sharding, "put_batch", 1),  # in the first step
    (loop.sharding, "put_batch", 1),  # in the last step
    (offline, "measure", 2),
    (offline.models, "save", 1),
    (recipe, "write_report", 1),
]


def test_a_signal_in_any_phase_loses_nothing(tmp_path, monkeypatch, capsys):
    folder = world.make(tmp_path)
    flags = ["--eval-data", str(folder / "pairs.jsonl")]
    assert world.run("dpo", folder, tmp_path / "whole", *flags) == 0
    before = signal.getsignal(signal.SIGTERM)
    for number, phase in enumerate(PHASES):
        how = (signal.SIGTERM, signal.SIGINT)[number % 2]
        with monkeypatch.context() as patch:
            stop_in(patch, *phase, how=how)
            assert world.run("dpo", folder, tmp_path / "cut", *flags) == 75, phase
        text = capsys.readouterr().err
        assert "error: stopped " in text and "Traceback" not in text
        exported = (tmp_path / "cut" / "model" / "config.json").exists()
        assert exported == (phase[1] == "write_report"), phase
        assert not (tmp_path / "cut" / "model.partial").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert world.run("dpo", folder, tmp_path / "cut", *flags) == 0
    whole, cut = (world.weights(tmp_path / name) for name in ("whole", "cut"))
    assert all((whole[name] == cut[name]).all() for name in whole)


def test_deferred_holds_a_stop_back_and_then_leaves():
    with pytest.raises(Preempted), StopSignal() as stop:
        with stop.deferred():
            assert not stop.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested(2)
            reached = True
        raise AssertionError("it has gone on")
    assert reached
    with StopSignal() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGTERM)


def test_entered_again_it_keeps_its_handlers():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        with stop:
            pass
        assert signal.getsignal(signal.SIGINT) == stop._handle
    assert signal.getsignal(signal.SIGINT) is before
