"""A checkpoint comes back exactly, or the one before it, or an error; never wrong."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
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


def test_all_damaged_is_an_error(saved):
    truncate(saved / "2")
    truncate(saved / "3")
    with pytest.raises(ValueError, match="step 3: .*step 2: "):
        Checkpointer(saved).restore(jax.eval_shape(tree))


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
