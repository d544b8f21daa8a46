"""Of two processes one dies, or is stopped: the other ends in time, and says where.

A loop of batches and fetched sums stands for a run, whose own commands are killed by
scripts/launch_faults.py: the same hooks (put_batch, gather, alive), and seconds of CPU.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from jalign.sharding.watchdog import EXIT_STUCK
from tests.command_process import ROOT
from tests.sharding.processes import free_port

LOOP = """
import sys, time
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from jalign import sharding

port, heartbeat, watchdog, fails, index = map(int, sys.argv[1:])
sharding.initialize(f"127.0.0.1:{port}", 2, index, heartbeat_timeout=heartbeat)
mesh, add = sharding.make_mesh(), jax.jit(lambda x: x.sum())
with sharding.watched(watchdog):
    for step in range(10**9):
        batch = sharding.put_batch(np.ones((2, 3), np.float32), mesh)
        try:
            sharding.gather(add(batch))
        except Exception:  # the other is gone
            sharding.leave(1)
            raise
        sharding.alive(f"step {step}")
        if step == 3:
            print("goes on", flush=True)
        if step == 9 and index == fails:
            sharding.leave(2)
            raise ValueError("of one process alone")
        time.sleep(0.02)
"""
SLACK = 15.0  # seconds, of a machine with much else to do


@pytest.fixture
def two():
    """Starts two processes that go on for ever -> (process 0, process 1)."""
    started: list[subprocess.Popen] = []

    def start(heartbeat: int, watchdog: int = 0, fails: int = -1):
        words = [sys.executable, "-c", LOOP, str(free_port())]
        for index in range(2):
            given = map(str, (heartbeat, watchdog, fails, index))
            started.append(
                subprocess.Popen(
                    [*words, *given],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )
            )
        for process in started:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            assert any("goes on" in line for line in lines)
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen, most: float) -> tuple[int, str]:
    """(its exit code, what it said on standard error); it has so many seconds."""
    began = time.monotonic()
    _, text = process.communicate(timeout=120)
    assert time.monotonic() - began < most + SLACK
    return process.returncode, text


def test_a_dead_process_ends_the_other_within_the_heartbeats_timeout(two):
    survivor, victim = two(heartbeat=3)
    victim.kill()
    code, text = ended(survivor, 3 + 2)
    assert code == -signal.SIGABRT, text


def test_a_stopped_process_ends_the_other_by_its_watch_and_then_itself(two):
    survivor, victim = two(heartbeat=100, watchdog=3)
    victim.send_signal(signal.SIGSTOP)
    code, text = ended(survivor, 3 * 1.1)
    assert code == EXIT_STUCK, text
    assert "process 0 of 2 on " in text and "last finished: step " in text
    assert "in gather" in text, "its stacks"
    victim.send_signal(signal.SIGCONT)
    code, text = ended(victim, 3 * 1.1)
    assert code != 0, text


def test_an_error_of_one_process_alone_ends_both_and_keeps_its_exit_code(two):
    """jax would wait five minutes, and then abort."""
    survivor, victim = two(heartbeat=3, fails=1)
    code, text = ended(victim, 3 + 5)
    assert code == 2 and "of one process alone" in text
    code, text = ended(survivor, 3 + 2)
    assert code == -signal.SIGABRT, text
