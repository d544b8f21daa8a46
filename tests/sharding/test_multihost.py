"""One process: no-ops and errors. Two real processes (gloo on localhost): the rest."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jalign import sharding

from . import processes


def test_initialize_without_a_cluster_does_nothing():
    sharding.initialize()
    sharding.initialize(num_processes=1)
    assert not jax.distributed.is_initialized()
    assert sharding.process_slice() == (0, 1)
    assert sharding.process_slice(sharding.make_mesh()) == (0, 1)
    assert sharding.is_main_process()
    assert not sharding.preempted(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", None, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("127.0.0.1", 2, 0), "not HOST:PORT"),
        (("127.0.0.1:x", 2, 0), "not HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "process_id 2 is not in 0 .. 1"),
    ],
)
def test_initialize_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sharding.initialize(*arguments)


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "2",  # of 0 and 1
    "SLURM_LOCALID": "0",
}


BROKEN = {
    "rank": SLURM,
    "count": SLURM | {"SLURM_NTASKS": "two", "SLURM_PROCID": "0"},
    "ompi5": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    "uri": {"OMPI_MCA_orte_hnp_uri": "65536.0;file://x", "OMPI_COMM_WORLD_SIZE": "2"},
    "tpu": {"TPU_WORKER_HOSTNAMES": "host0,host1"},
    "coordinator": {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"},
}


def test_a_cluster_that_cannot_be_joined_is_not_left_for_training_alone():
    code = f"""
import os
from jalign import cli
clean = dict(os.environ)
for name, env in {BROKEN!r}.items():
    os.environ.update(env)
    print(name, cli.main(["generate", "--model", "x", "--prompts", "y"]))
    os.environ.clear()
    os.environ.update(clean)
os.environ.update({SLURM!r})
cli.start_jax(cli.Launch(num_processes=1))
print("alone on request")
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [*(f"{name} 2" for name in BROKEN), "alone on request"]
    assert run.stdout.splitlines() == lines, run.stderr
    assert run.stderr.count("cannot join the others") == len(BROKEN)
    assert "Traceback" not in run.stderr


def test_a_used_notebook_stays_alone_only_where_it_is_alone(monkeypatch):
    jax.devices()
    sharding.initialize()
    monkeypatch.setenv("SLURM_NTASKS", "2")  # a batch script, without srun
    sharding.initialize()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "a,b")
    with pytest.raises(ConnectionError, match=r"one of 2 .* must be called before"):
        sharding.initialize()


def test_put_batch_and_gather_in_one_process():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "w": np.ones(4)}
    placed = sharding.put_batch(batch, mesh)
    assert placed["tokens"].sharding.spec == P(("data", "fsdp"))
    for back in (placed, sharding.put_batch(batch, None)):
        np.testing.assert_array_equal(sharding.gather(back)["tokens"], batch["tokens"])


def test_gather_reads_typed_keys():
    data = sharding.gather(jax.random.key(3))
    np.testing.assert_array_equal(data, jax.random.key_data(jax.random.key(3)))


@pytest.mark.parametrize("rows", [np.ones((6, 2)), np.float32(1)])
def test_put_batch_names_the_array_that_does_not_divide(rows):
    with pytest.raises(ValueError, match=r"batch\['x'\].*multiple of 8 rows"):
        sharding.put_batch({"x": rows}, sharding.make_mesh())


def _two_processes():
    import jax.numpy as jnp
    import numpy as np

    me, count = sharding.process_slice()
    assert (count, len(jax.devices()), len(jax.local_devices())) == (2, 8, 4)
    assert sharding.is_main_process() == (me == 0)
    rows = np.arange(48, dtype=np.int32).reshape(16, 3)

    # Rows over both processes, and a tensor or context axis that crosses them.
    crossing = dict(tensor=8), dict(fsdp=1, context=8)
    apart = dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, context=4)
    for sizes in apart + crossing:
        mesh = sharding.make_mesh(**sizes)
        index, shards = sharding.process_slice(mesh)
        assert shards == (1 if sizes in crossing else 2), sizes
        n = len(rows) // shards
        batch = sharding.put_batch({"x": rows[index * n : (index + 1) * n]}, mesh)
        assert batch["x"].shape == rows.shape
        np.testing.assert_array_equal(sharding.gather(batch)["x"], rows)
        total = jax.jit(lambda x: jnp.sum(x * x))(batch["x"])
        assert int(total) == int((rows * rows).sum())

    try:
        sharding.put_batch({"x": rows[:3]}, sharding.make_mesh())
        raise AssertionError("3 rows on 4 devices were accepted")
    except ValueError as error:
        assert "multiple of 4 rows" in str(error)

    sharding.agree("config", {"learning_rate": 1e-3})
    try:
        sharding.agree("seed", me)
        raise AssertionError("different seeds were accepted")
    except ValueError as error:
        assert "differ in seed: seed is 0 on process 0 (" in str(error)
        assert "), 1 on process 1 (" in str(error)
    sharding.agree("settings", {"a": 1, "inner": {"b": 2}})
    inner = {"b": 2} | ({"c": 4} if me else {})
    try:
        sharding.agree("settings", {"a": 1, "inner": inner})
        raise AssertionError("different settings were accepted")
    except ValueError as error:
        text = str(error)
        assert "in settings: c is not there on process 0 (" in text and " 4 on" in text
        assert "a is" not in text and "b is" not in text
    sharding.barrier("end")
    assert not sharding.preempted(0)
    return me


def test_two_processes():
    assert processes.run(_two_processes) == [0, 1]


def _sigterm_to_process_1():
    import os
    import signal
    import time

    me, _ = sharding.process_slice()
    for step in range(400):
        if me == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if sharding.preempted(step):
            break
        sharding.barrier(f"step {step}")
        time.sleep(0.01)
    return step


def test_sigterm_to_one_process_stops_both_at_the_same_step():
    first, second = processes.run(_sigterm_to_process_1)
    assert first == second
    assert 5 <= first < 399
