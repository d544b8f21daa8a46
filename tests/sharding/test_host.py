"""Freed memory stays with the process: the second use of it costs no page fault."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from jalign.sharding import host

CODE = """
import resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
from jalign import sharding
if sys.argv[1] == "keep":
    assert sharding.keep_freed_memory()
program = jax.jit(lambda x: ((x @ x.T) @ x).sum())
x, found = jax.numpy.ones((4096, 64)), []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(found))
"""
PAGES = 4096 * 4096 * 4 // 4096  # of x @ x.T


def faults(how):
    """The fewest page faults of a call."""
    run = [sys.executable, "-c", CODE, how]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_temporaries_of_a_program_are_not_asked_for_anew():
    assert faults("give back") > PAGES / 2 and faults("keep") < PAGES / 10


def test_with_an_accelerator_nothing_is_done(monkeypatch):
    monkeypatch.setattr(host, "_may_have_accelerator", lambda: True)
    monkeypatch.setattr(host.ctypes, "CDLL", lambda name: pytest.fail("mallopt"))
    assert not host.keep_freed_memory()


@pytest.mark.parametrize("platforms, want", [("cpu", False), (None, True)])
def test_a_plugin_of_jax_counts_as_an_accelerator(monkeypatch, platforms, want):
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(host, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(host, "entry_points", lambda group: ["cuda"])
    assert host._may_have_accelerator() is want
