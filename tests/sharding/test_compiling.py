"""Tests for jalign/sharding/compiling.py."""

import jax
import jax.numpy as jnp
import pytest

from jalign import sharding

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Names of what jax has compiled since."""
    names: list[str] = []

    def note(event, seconds, fun_name="", **_):
        if event == COMPILED:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def words(batch, *, times):
    return sharding.batch_words(f"the product by {times}", batch)


def test_each_compilation_is_said_once_and_no_other_call(compiled, caplog):
    def product_of_rows(batch, *, times):
        return times * batch

    step = sharding.announced(product_of_rows, words, static_argnames="times")
    with caplog.at_level("INFO", "jalign"):
        for rows, times in ((4, 2), (4, 2), (6, 2), (4, 3), (6, 2)):
            assert step(jnp.ones((rows, 3, 8)), times=times)[0, 0, 0] == times
    messages = [record.message for record in caplog.records]
    assert messages[::2] == [
        "compiling the product by 2 for batches of 12 x 8, once",
        "compiling the product by 2 for batches of 18 x 8, once",
        "compiling the product by 3 for batches of 12 x 8, once",
    ]
    assert messages[1].startswith("... the product by 2 for batches of 12 x 8 took ")
    ours = [name for name in compiled if "product_of_rows" in name]
    assert len(ours) == len(messages) // 2 == 3


def test_a_failed_compilation_is_not_taken_for_the_next_one(caplog):
    def fails_on_rows(batch, *, times):
        if len(batch) == 1:
            raise TypeError("one row")
        return batch

    step = sharding.announced(fails_on_rows, words, static_argnames="times")
    with caplog.at_level("INFO", "jalign"):
        with pytest.raises(TypeError, match="one row"):
            step(jnp.ones((1, 8)), times=1)
        step(jnp.ones((2, 8)), times=1)
    assert [record.message[:3] for record in caplog.records] == ["com", "com", "..."]


def test_what_is_only_lowered_is_not_announced(caplog):
    step = sharding.announced(
        lambda batch, times: batch, words, static_argnames="times"
    )
    with caplog.at_level("INFO", "jalign"):
        assert step.lower(jnp.ones((2, 8)), times=1).compile() is not None
    assert not caplog.records
