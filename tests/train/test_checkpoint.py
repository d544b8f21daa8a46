"""A checkpoint comes back exactly, or the one before it, or an error; never wrong."""

import errno
import json
import logging
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.train import checkpoint, integrity
from jalign.train.checkpoint import Checkpointer
from tests.train import tiny


def tree(value=1.0):
    return {
        "params": {"w": value + jax.random.normal(jax.random.key(0), (64, 32))},
        "step": jnp.int32(value),
        "key": jax.random.key(7),
    }


@pytest.fixture
def saved(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, tree(step), {"rate": 1e-5 / 3})
    checkpointer.close()
    return tmp_path


def test_round_trip_and_keep(saved):
    checkpointer = Checkpointer(saved)
    assert checkpointer.steps() == [2, 3]
    restored = checkpointer.restore(jax.eval_shape(tree))
    assert (restored.step, restored.meta) == (3, {"rate": 1e-5 / 3})
    assert tiny.same(restored.tree, tree(3))
    assert checkpointer.peek() == restored.meta


def test_nothing_saved(tmp_path):
    assert Checkpointer(tmp_path / "new").restore(jax.eval_shape(tree)) is None


def test_onto_another_mesh(saved):
    mesh = sharding.make_mesh(fsdp=8)
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.replicated(mesh)
        ),
        jax.eval_shape(tree),
    )
    target["params"]["w"] = jax.ShapeDtypeStruct(
        (64, 32), jnp.float32, sharding=sharding.batch_sharding(mesh)
    )
    restored = Checkpointer(saved).restore(target).tree
    assert tiny.same(restored, tree(3))
    assert len(restored["params"]["w"].addressable_shards) == 8


def flip_bit(path):
    # In the middle of each data file: the arrays are random, so they do not compress.
    for file in path.rglob("*"):
        if file.parent.name == "d":
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 1
            file.write_bytes(raw)


def truncate(path):
    for file in path.rglob("*"):
        if file.parent.name == "d":
            file.write_bytes(b"")


def empty(path):
    for file in sorted(path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


def change_record(path):
    file = path / "meta" / "metadata"
    record = json.loads(file.read_text())
    record["meta"]["rate"] = 1.0
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, change_record])
def test_damage_falls_back(saved, damage, caplog):
    damage(saved / "3")
    with caplog.at_level(logging.WARNING, "jalign"):
        restored = Checkpointer(saved).restore(jax.eval_shape(tree))
    assert restored.step == 2 and tiny.same(restored.tree, tree(2))
    assert (saved / "3.corrupt").is_dir() and "falling back to step 2" in caplog.text


def test_all_damaged_is_an_error_at_every_start_and_nothing_is_renamed(saved):
    truncate(saved / "2")
    truncate(saved / "3")
    for _ in range(2):
        with pytest.raises(ValueError, match="step 3: .*step 2: .*--no-resume"):
            Checkpointer(saved).restore(jax.eval_shape(tree))
    assert Checkpointer(saved).steps() == [2, 3]


def test_nothing_but_damaged_steps_of_before_is_no_fresh_start(saved):
    (saved / "2").rename(saved / "2.corrupt")
    (saved / "3").rename(saved / "3.corrupt1")
    for read in (Checkpointer(saved).peek, lambda: Checkpointer(saved).restore(None)):
        with pytest.raises(ValueError, match="2.corrupt; 3.corrupt1.*--no-resume"):
            read()


def fails(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), OSError),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), OSError),
        (MemoryError(), MemoryError),
        (ValueError("NOT_FOUND: opening d/1 [OS error 5: EIO]"), OSError),
        (ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError),
    ],
    ids=str,
)
@pytest.mark.parametrize("what", ["arrays", "record"])
def test_what_cannot_be_reached_is_not_damaged(saved, monkeypatch, what, error, kind):
    checkpointer = Checkpointer(saved)
    if what == "arrays":
        monkeypatch.setattr(checkpointer._orbax, "restore", fails(error))
    else:
        monkeypatch.setattr("pathlib.Path.read_bytes", fails(error))
        with pytest.raises(kind):
            checkpointer.peek()
    with pytest.raises(kind):
        checkpointer.restore(jax.eval_shape(tree))
    assert checkpointer.steps() == [2, 3] and not list(saved.glob("*.corrupt*"))
    monkeypatch.undo()
    assert Checkpointer(saved).restore(jax.eval_shape(tree)).step == 3


def test_an_error_that_hides_its_cause_is_looked_into(saved, monkeypatch):
    """Orbax may say anything; a file that cannot be read says why."""
    checkpointer = Checkpointer(saved)
    monkeypatch.setattr(checkpointer._orbax, "restore", fails(ValueError("no luck")))
    monkeypatch.setattr(
        integrity, "open_to_read", fails(OSError(errno.EIO, "I/O error"))
    )
    with pytest.raises(OSError, match="I/O error"):
        checkpointer.restore(jax.eval_shape(tree))


@pytest.mark.parametrize("name", ["007", "٩٩", "9" * 30, "-1", "latest"])
def test_foreign_names_do_no_harm(saved, name):
    (saved / name).mkdir()
    checkpointer = Checkpointer(saved)
    assert checkpointer.steps() == [2, 3]
    assert checkpointer.restore(jax.eval_shape(tree)).step == 3
    checkpointer.save(4, tree(4), {})
    checkpointer.close()
    assert checkpointer.steps() == [3, 4] and (saved / name).is_dir()


def test_a_disk_that_has_space_again_clears_the_failure(tmp_path, monkeypatch, caplog):
    checkpointer = Checkpointer(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer._orbax, "save", fails(full))
        checkpointer.save(1, tree(), {})
    assert "No space left" in caplog.text
    checkpointer.save(2, tree(), {})
    checkpointer.close()
    assert Checkpointer(tmp_path).steps() == [2]
    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setattr(checkpointer._orbax, "save", fails(full))
    checkpointer.save(3, tree(), {})
    with pytest.raises(OSError, match="No space left"):
        checkpointer.close()


def test_a_slow_save_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "_SLOW", 0.05)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, tree(), {})
    real = checkpointer._wait
    monkeypatch.setattr(checkpointer, "_wait", lambda: time.sleep(0.1) or real())
    checkpointer.save(2, tree(), {})
    assert "for the checkpoint of step 1" in caplog.text
    checkpointer.close()


@pytest.mark.parametrize(
    "other", [jnp.zeros((64, 31)), jnp.zeros((64, 32), jnp.bfloat16)]
)
def test_another_structure_raises_and_quarantines_nothing(saved, other):
    wanted = tree() | {"params": {"w": other}}
    with pytest.raises(ValueError, match=r"params/w is float32\[64,32\] there"):
        Checkpointer(saved).restore(wanted)
    with pytest.raises(ValueError, match="params/more is absent"):
        wanted = tree()
        wanted["params"]["more"] = jnp.zeros(2)
        Checkpointer(saved).restore(wanted)
    assert Checkpointer(saved).steps() == [2, 3]


def test_donating_after_save_is_safe(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=9)
    double = jax.jit(lambda x: jax.tree.map(lambda y: y * 2, x), donate_argnums=0)
    x = {"w": jnp.ones((256, 256))}
    for step in range(4):
        checkpointer.save(step, x, {})
        x = double(x)
    checkpointer.close()
    again = Checkpointer(tmp_path, keep=9).restore({"w": jnp.ones((256, 256))})
    assert np.all(np.asarray(again.tree["w"]) == 8)


def test_leftovers_of_a_kill_are_removed(saved):
    for name in ("4.orbax-checkpoint-tmp", "1.deleting"):
        (saved / name).mkdir()
    assert Checkpointer(saved).steps() == [2, 3]
    assert not list(saved.glob("*.deleting")) + list(saved.glob("4.*"))
