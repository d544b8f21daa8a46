"""A process that has stopped moving ends itself, whatever it hangs in."""

import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.sharding import watchdog


def ended(code: str) -> tuple[int, str, float]:
    """(exit code, standard error, seconds from its word "go" on) of a script."""
    head = "import sys, time, threading, ctypes, jax\nfrom jalign import sharding\n"
    head += "jax.config.update('jax_platforms', 'cpu')\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    began = time.monotonic()
    _, text = process.communicate(timeout=120)
    return process.returncode, text, time.monotonic() - began


def test_a_stuck_process_says_where_it_stands_and_ends():
    code, text, seconds = ended(
        """
        def stuck_here():
            print("go", flush=True)
            threading.Event().wait()

        with sharding.watched(2.0):
            sharding.alive("step 7")
            stuck_here()
        """
    )
    assert code == watchdog.EXIT_STUCK == 76
    assert 1.5 < seconds < 10
    assert (
        "process 0 of 1 on " in text
        and "for more than 2 s; last finished: step 7" in text
    )
    assert "stuck_here" in text, "its stacks"


def test_one_that_holds_the_interpreter_ends_as_well():
    """Python's own threads cannot run then: only faulthandler's can."""
    code, text, _ = ended(
        """
        with sharding.watched(1.0):
            sharding.alive()
            print("go", flush=True)
            ctypes.PyDLL(None).sleep(100)
        """
    )
    assert code == 1 and "Timeout" in text and "most recent call first" in text


class Clock:
    """Time goes on where the test says so; `ended` is what a watch has done then."""

    def __init__(self):
        self.now, self.ended = 0.0, 0

    def monotonic(self) -> float:
        return self.now

    def passes(self, seconds: float) -> bool:
        """Whether the process is ended by then."""
        self.now, before = self.now + seconds, self.ended
        if watchdog._watch is not None:
            watchdog._watch.check()
        return self.ended > before


@pytest.fixture
def clock(monkeypatch):
    made = Clock()

    def end(watch):
        made.ended += 1

    monkeypatch.setattr(watchdog, "time", made)
    monkeypatch.setattr(watchdog._Watch, "_end", end)
    return made


def test_signs_of_life_keep_a_process_and_the_first_starts_the_clock(clock):
    mesh, rows = sharding.make_mesh(), np.zeros((8, 2), np.float32)
    with sharding.watched(100.0):
        assert not clock.passes(1000), "loading takes its time"
        for sign in (
            lambda: sharding.put_batch({"x": rows}, mesh),
            lambda: sharding.gather(rows),
            lambda: sharding.alive("step 1"),
        ):
            sign()
            assert not clock.passes(99)
            sign()
            assert not clock.passes(99)
        assert clock.passes(2)
    assert not clock.passes(1000), "the watch is over"


def test_compiling_takes_its_time_and_running_does_not(clock):
    def slow(x):
        assert not clock.passes(1000)
        return x + 1

    function = sharding.announced(slow, lambda x: "a slow one")
    with sharding.watched(100.0):
        sharding.alive()
        result = function(jnp.zeros(()))
        sharding.put_batch({"x": np.zeros(8)}, None)
        assert not clock.passes(1000), "another process may be compiling"
        sharding.gather(result)
        assert not clock.passes(99)
        assert clock.passes(2), "it has run once, so it is there on all of them"
        sharding.alive()


def test_the_first_run_of_a_program_may_not_take_for_ever(clock):
    """The first call of a jitted function both compiles and runs."""
    with sharding.watched(100.0):
        watchdog.compiling("slow")
        for name, ended in (("jit_other", False), ("jit_slow", True)):
            about = {"fun_name": name}
            jax.monitoring.record_event_duration_secs(watchdog.COMPILED, 1.0, **about)
            assert clock.passes(watchdog.SEVERAL_PROCESSES + 1) == ended


def test_a_sign_that_comes_too_late_ends_the_process(clock):
    """It was stopped, and woken up: the other processes are gone."""
    with sharding.watched(100.0):
        sharding.alive("step 1")
        clock.now = 101
        sharding.alive("step 2")
        assert clock.ended


def test_one_process_is_not_watched_unless_it_is_asked_for(monkeypatch):
    made: list[float] = []

    class Watch(watchdog._Watch):
        def __init__(self, timeout):
            made.append(timeout)
            super().__init__(timeout)

    monkeypatch.setattr(watchdog, "_Watch", Watch)
    for timeout in (None, 0.0):
        with sharding.watched(timeout):
            sharding.alive()
    assert not made
    with sharding.watched(100.0), sharding.watched(200.0):
        pass
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with sharding.watched():
        pass
    with sharding.watched(0):
        pass
    assert made == [100.0, 200.0, watchdog.SEVERAL_PROCESSES]
