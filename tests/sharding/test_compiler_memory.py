"""Tests for jalign/sharding/compiling.py: the memory that a compilation has freed."""

import jax
import pytest

from jalign.sharding import compiling

COMPILED = "/jax/core/compile/backend_compile_duration"


class FakeLibrary:
    def __init__(self):
        self.calls = []

    def malloc_trim(self, padding):
        self.calls.append(padding)


def test_a_compilation_ends_with_the_event_that_is_listened_for():
    seen = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: seen.append(event)
    )
    jax.jit(lambda x: x * 3.25 + 17)(jax.numpy.ones(7)).block_until_ready()
    assert COMPILED in seen


@pytest.mark.parametrize(
    ("event", "seconds", "calls"),
    [(COMPILED, 1.0, [0]), (COMPILED, 0.1, []), ("/jax/other", 1.0, [])],
)
def test_memory_is_given_back_after_long_compilations(
    event, seconds, calls, monkeypatch
):
    listeners, library = [], FakeLibrary()
    name = "register_event_duration_secs_listener"
    monkeypatch.setattr(jax.monitoring, name, listeners.append)
    monkeypatch.setattr(compiling.ctypes, "CDLL", lambda name: library)
    compiling.give_back_compiler_memory.cache_clear()
    for _ in range(2):  # it listens once
        compiling.give_back_compiler_memory()
    compiling.give_back_compiler_memory.cache_clear()
    (listener,) = listeners
    listener(event, seconds, backend="cpu")
    assert library.calls == calls
