"""The context axis: shares of rows, dealt in balance, and lengths that divide."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jalign import data, plan, sharding, train
from jalign.data.batching import in_multiples
from jalign.sharding.context import (
    context_parts,
    cuts_time,
    deal,
    dealt_order,
    dealt_starts,
    gather_time,
    length_multiple,
    rows_to_time,
    time_to_rows,
    undeal,
)

LONG = dict(fsdp=2, context=4)


def test_a_device_has_whole_rows_of_ids_and_a_share_of_what_is_wide():
    mesh = sharding.make_mesh(**LONG)
    assert (context_parts(mesh), context_parts(None)) == (4, 1)
    assert sharding.batch_parts(mesh) == 2 and sharding.process_slice(mesh) == (0, 1)
    tokens = sharding.put_batch({"tokens": np.zeros((4, 16), np.int32)}, mesh)["tokens"]
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 16)}
    wide = jax.jit(lambda x: sharding.constrain(x, mesh, "batch", "time", None))
    assert wide(jnp.zeros((4, 16, 8))).sharding.spec == P("fsdp", "context")
    # To weights it is one more fsdp axis.
    shapes = {"norm": {"scale": jnp.zeros(4)}, "score": {"kernel": jnp.zeros((16, 1))}}
    placed = sharding.param_shardings(mesh, shapes)
    assert placed["score"]["kernel"].spec == P(("fsdp", "context"), None)


def test_shares_become_rows_and_nothing_moves():
    mesh = sharding.make_mesh(**LONG)
    x = jnp.arange(4 * 16 * 3.0).reshape(4, 16, 3)
    place = jax.NamedSharding(mesh, P("fsdp", "context"))
    there = jax.jit(lambda x: time_to_rows(x, mesh), in_shardings=place)
    rows = there(x)
    assert rows.shape == (16, 4, 3)
    for shard in rows.addressable_shards:
        device = shard.device.id
        mine = x[2 * (device // 4) :][:2, 4 * (device % 4) :][:, :4]
        np.testing.assert_array_equal(shard.data, mine)
    back = jax.jit(lambda x: rows_to_time(x, mesh, 4), out_shardings=place)
    np.testing.assert_array_equal(back(rows), x)
    both = jax.jit(lambda x: rows_to_time(time_to_rows(x, mesh), mesh, 4))
    text = both.lower(jax.device_put(x, place)).compile().as_text()
    assert not re.search("all-|collective-|reduce-scatter", text)
    for odd in (jnp.zeros((3, 16)), jnp.zeros((4, 6))):  # as many rows as there were
        assert time_to_rows(odd, mesh) is odd


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_dealt_pieces_are_as_much_work_for_every_device(parts):
    devices = jax.devices()[:parts]
    mesh = sharding.make_mesh(context=parts, fsdp=1, devices=devices)
    length = 6 * parts
    times = jnp.arange(length)[None]

    def local(x):
        dealt = deal(x)
        starts = dealt_starts(x.shape[1])
        named = (starts[:, None] + jnp.arange(3)[None]).reshape(1, -1)
        return dealt, named, undeal(dealt)

    axes = ("batch", "time")
    fn = sharding.shard_map(local, mesh, [axes], (axes,) * 3)
    dealt, named, back = jax.jit(fn)(times)
    np.testing.assert_array_equal(dealt, named)
    np.testing.assert_array_equal(dealt[0], dealt_order(mesh, length))
    np.testing.assert_array_equal(back, times)
    keys_seen = (np.asarray(dealt) + 1).reshape(parts, -1).sum(axis=1)
    assert len(set(keys_seen)) == 1


def test_gradients_of_gathered_keys_add_up_in_float32():
    mesh = sharding.make_mesh(context=8, fsdp=1)
    x = jnp.ones((1, 16), jnp.bfloat16)
    # 256 and seven ones: a sum in bfloat16 would stay at 256.
    weights = jnp.array([256.0] + [1.0] * 7)[None]

    def local(x, weight):
        return weight * gather_time(x).astype(jnp.float32).sum()[None, None]

    axes = ("batch", "time")
    fn = sharding.shard_map(local, mesh, [axes, axes], axes)
    gradient = jax.grad(lambda x: fn(x, weights).sum())
    got = jax.jit(gradient)(x)
    np.testing.assert_array_equal(got, np.full((1, 16), 264.0))  # 263, rounded once
    # XLA on a CPU adds up in float32 whatever it is asked.
    assert re.search(r":f32\S* = reduce_scatter", str(jax.make_jaxpr(gradient)(x)))


def test_lengths_divide_or_the_flag_and_the_mesh_are_named(tmp_path):
    mesh = sharding.make_mesh(**LONG)
    assert (length_multiple(None), length_multiple(sharding.make_mesh(), 7)) == (1, 1)
    assert length_multiple(mesh, 24) == 8
    assert cuts_time(mesh, 24) and not cuts_time(mesh, 20) and not cuts_time(None, 24)
    with pytest.raises(ValueError, match=r"--max-length 20 .* 8, .*context.* 16 or 24"):
        length_multiple(mesh, 20)
    with pytest.raises(ValueError, match="take 8$"):
        length_multiple(mesh, 5)
    where = dict(model="none", data="none", out=str(tmp_path / "out"))
    how = dict(mesh="fsdp=2,context=4", max_length=100, steps=1)
    with pytest.raises(ValueError, match="--max-length 100"):
        train.run_sft(**where, **how)
    with pytest.raises(ValueError, match="--max-length 100"):
        plan.plan("sft", "llama-3.2-1b", topology="v5e:2x4", **how)


def test_batches_are_padded_to_a_multiple():
    example = data.Example(np.arange(3, dtype=np.int32), np.ones(3, bool))
    batch = in_multiples(data.collate_tokens, 24)([example], 16)
    assert batch.tokens.shape == (1, 24)


def test_a_plan_counts_shares():
    how = dict(max_length=16384, remat=True, dtype="bfloat16", topology="v5p:4x4x4")

    def rows(mesh, batch_size):
        given = dict(mesh=mesh, batch_size=batch_size)
        found = plan.plan("sft", "llama-3.1-8b", **given, **how)
        every = *found.resident, *found.transient["update"]
        return {row.name: row.bytes for row in every}

    short, long = rows("fsdp=64", 64), rows("fsdp=8,context=8", 8)
    for name in ("parameters", "optimizer state", "gradients", "gathered weights"):
        assert long[name] == short[name]
    assert long["layer inputs"] == short["layer inputs"] // 8
    # Keys and values, 8 heads of 128, in bfloat16; and as much of gradients.
    assert long["gathered keys"] == 2 * 16384 * 8 * 128 * 2 * 2
    assert "gathered keys" not in short
