"""OUT belongs to one run at a time, and to one set of settings."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jalign.data.templates import with_clock
from jalign.train.config import RewardConfig, SFTConfig
from jalign.train.inputs import STEPS
from jalign.train.online_config import GRPOConfig
from jalign.train.optim import OptimConfig
from jalign.train.run import (
    fixed_settings,
    identify,
    lock_directory,
    make_run_mesh,
    open_run,
    restore_state,
)
from tests.sharding import processes


def config(out, **changes):
    fields = dict(model="m", data="d", mesh="fsdp=1") | changes
    return SFTConfig(out=str(out), **fields)


INPUTS = {"the model's weights": "1", "the training rows": "2"}


def save(out, inputs=INPUTS, **changes):
    with open_run(config(out, **changes), "sft") as run:
        run = identify(run, inputs, "")
        run.checkpointer.save(1, {"x": jnp.ones(2)}, run.meta)


def test_same_settings_continue_others_are_refused(tmp_path):
    save(tmp_path)
    with open_run(config(tmp_path, steps=7, checkpoint_every=1), "sft") as run:
        assert restore_state(run, {"x": jnp.ones(2)}).step == 1
    other = dict(optim=OptimConfig(learning_rate=0.5))
    match = "learning_rate was 1e-05 and is 0.5.*--no-resume"
    with pytest.raises(ValueError, match=match):
        save(tmp_path, **other)
    with (
        pytest.raises(ValueError, match="kind was 'sft' and is 'dpo'"),
        open_run(config(tmp_path), "dpo"),
    ):
        pass
    save(tmp_path, resume=False, **other)  # as the message says
    with pytest.raises(ValueError, match="learning_rate was 0.5 and is 1e-05"):
        save(tmp_path)


def test_inputs_are_compared_by_content_and_named(tmp_path):
    save(tmp_path)
    save(tmp_path, model="elsewhere", data="elsewhere/d")
    with pytest.raises(ValueError, match="[(]the training rows changed[)]"):
        save(tmp_path, INPUTS | {"the training rows": "3"})
    longer = INPUTS | {STEPS: "8"}
    save(tmp_path / "b", INPUTS | {STEPS: "4"})
    with (
        open_run(config(tmp_path / "b"), "sft") as run,
        pytest.raises(ValueError, match="steps was 4 and is 8.*--reschedule"),
    ):
        identify(run, longer, "")
    with open_run(config(tmp_path / "b"), "sft") as run:
        assert identify(run, longer, "", reschedule=True).meta["inputs"] == longer


def test_the_options_of_a_reward_model_may_not_change():
    """They are called `reward`, as the source of an online run's rewards is."""
    given = dict(model="m", data="d", out="o")
    kept = fixed_settings(RewardConfig(**given))
    assert kept["reward"]["center_coef"] == 0.0 and "data" not in kept
    assert "reward" not in fixed_settings(GRPOConfig(reward="gsm8k", **given))


def test_a_checkpoint_without_inputs_goes_on_with_a_warning(tmp_path, caplog):
    """As 0.1 wrote them: paths in the settings, no digests, no clock."""
    old = fixed_settings(config(tmp_path)) | {"kind": "sft", "model": "m", "data": "d"}
    del old["optim"]["b1"]  # a field of later
    with open_run(config(tmp_path), "sft") as run:
        run.checkpointer.save(1, {"x": jnp.ones(2)}, {"config": old})
    with open_run(config(tmp_path), "sft") as run:
        identify(run, INPUTS, "")
    assert "same model's weights, training rows cannot be checked" in caplog.text
    with (
        pytest.raises(ValueError, match="data was 'd' and is 'other'"),
        open_run(config(tmp_path, data="other"), "sft"),
    ):
        pass


def test_the_clock_of_templates_is_that_of_the_first_start(tmp_path):
    save(tmp_path)
    seen = []
    for _ in range(2):
        with open_run(config(tmp_path), "sft") as run:
            seen.append((run.meta["clock"], with_clock("{{ strftime_now('%f') }}")))
    assert seen[0] == seen[1] and "macro" in seen[0][1]
    assert with_clock("{{ strftime_now('%f') }}").startswith("{{")


def test_no_resume_sets_the_old_checkpoints_aside(tmp_path):
    save(tmp_path)
    with open_run(config(tmp_path, resume=False), "sft") as run:
        assert restore_state(run, {"x": jnp.ones(2)}) is None
    assert (tmp_path / "checkpoints.old1" / "1").is_dir()


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    code = (
        "import sys, pathlib; from jalign.train.run import lock_directory\n"
        "lock = lock_directory(pathlib.Path(sys.argv[1])); lock.__enter__()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    match = f"another run is working here .process {other.pid}"
    with pytest.raises(ValueError, match=match), lock_directory(tmp_path):
        pass
    other.kill()
    other.wait()
    with lock_directory(tmp_path):
        pass


def hosts_body():
    import os
    from types import SimpleNamespace

    from jalign.train.config import SFTConfig
    from jalign.train.inputs import agree_before_loading, params_digest
    from jalign.train.run import identify, open_run
    from tests.train import tiny

    out, index = os.environ["RUN_OUT"], jax.process_index()
    told = []
    for steps, rows, held_out in ((index + 1, "1", "2"), (1, str(index), "2")):
        config = SFTConfig(out=out, model=f"m{index}", data="d", steps=steps)
        try:
            with open_run(config, "sft") as run:
                identify(run, {"the training rows": rows}, held_out)
        except ValueError as error:
            told.append(str(error))
    with open_run(SFTConfig(out=out, model="m", data="d"), "sft") as run:
        told.append(run.meta["clock"])
    # Before the weights: their shapes differ, and with them the programs.
    opened = SimpleNamespace(config=tiny.config(num_layers=2 + index))
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 3 + index), "float32")}
    for compare in (
        lambda: agree_before_loading(opened, {"the training rows": "1"}, "2"),
        lambda: params_digest(shapes),
    ):
        try:
            compare()
        except ValueError as error:
            told.append(str(error))
    return told


def test_hosts_with_other_settings_or_rows_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_OUT", str(tmp_path))
    one, two = processes.run(hosts_body, devices=1)
    for settings, rows in ((one[0], one[1]), (two[0], two[1])):
        assert "steps is 1 on process 0 (" in settings and ", 2 on" in settings
        assert "seed" not in settings
        assert "the training rows is 0 on process 0 (" in rows and ", 1 on" in rows
        assert "held-out" not in rows
    assert one[2] == two[2], "one clock for all"
    for told in (one, two):
        assert "num_layers is 2 on process 0 (" in told[3] and ", 3 on" in told[3]
        assert "rows" not in told[3].partition("num_layers")[0]
        assert "kernel is float32[2,3] on process 0 (" in told[4]
        assert "), float32[2,4] on process 1 (" in told[4]


def test_mesh_of_a_flag():
    assert make_run_mesh("fsdp=1") is None
    assert make_run_mesh("fsdp=2,tensor=2").size == 4
    assert make_run_mesh(None).size == len(jax.devices())
    assert dataclasses.is_dataclass(config("o"))


@pytest.mark.parametrize(
    ("spec", "devices", "fits"),
    [
        ("fsdp=8", 1, "data=1,fsdp=1,tensor=1"),
        ("tensor=2", 1, "data=1,fsdp=1,tensor=1"),
        ("data=2", 1, "data=1,fsdp=1,tensor=1"),
        ("fsdp=16,tensor=2", 8, "data=1,fsdp=4,tensor=2"),
        ("data=3", 8, "data=1,fsdp=8,tensor=1"),
    ],
)
def test_a_mesh_of_devices_that_are_not_there(monkeypatch, spec, devices, fits):
    there = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: there)
    match = f"number of devices, {devices}; what fits is {fits}"
    with pytest.raises(ValueError, match=match):
        make_run_mesh(spec)
    made = make_run_mesh(fits)
    assert (made.size if made else 1) == devices


def test_devices_left_idle_are_named(caplog):
    make_run_mesh("fsdp=2")
    assert "leaves 6 of 8 devices idle" in caplog.text
