"""Tests for plan.recomputed: remat where the accelerator has no room without."""

import json
import logging

import pytest

from jalign import cli, plan, sharding, train
from jalign.settings import settings_or

# Without remat its activations take more than a v5e chip has, with it they fit.
RUN = dict(model="llama-3.2-1b", data="", batch_size=32, max_length=4096)
RUN |= dict(mesh="fsdp=8", dtype="bfloat16")


@pytest.fixture
def on_a_slice(monkeypatch):
    """This machine is a slice of TPUs, as far as plans know."""
    real = sharding.machine
    told = ["v5e:2x4"]
    there = lambda topology=None: real(topology or told[0])  # noqa: E731
    monkeypatch.setattr(sharding, "machine", there)
    return told


def test_a_run_without_room_is_recomputed_and_says_so(on_a_slice, caplog):
    config = settings_or(train.SFTConfig, None, RUN | {"out": "x"})
    with caplog.at_level(logging.INFO, "jalign"):
        got = plan.recomputed(config)
    assert got.compute.remat and "--no-auto-remat" in caplog.text
    assert not plan.plan(config).fits and plan.plan(got).fits
    assert got == plan.recomputed(got)
    on_a_slice[0] = "v5p:2x2x2"
    assert plan.recomputed(config) is config


def test_a_machine_of_unknown_memory_leaves_the_run():
    config = settings_or(train.SFTConfig, None, RUN | {"out": "x"})
    assert plan.recomputed(config) is config


@pytest.mark.parametrize(("flags", "remat"), [([], True), (["--no-auto-remat"], False)])
def test_the_command_starts_what_its_plan_says(
    flags, remat, on_a_slice, capsys, monkeypatch
):
    started = []
    monkeypatch.setattr(train, "run_sft", started.append)
    words = [f"--{key.replace('_', '-')}={value}" for key, value in RUN.items()]
    assert cli.main(["sft", "--out", "x", *words, *flags]) == 0
    assert started[0].compute.remat == remat
    assert (
        cli.main(["plan", "sft", *words, "--topology=v5e:2x4", "--json=-", *flags]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is remat
