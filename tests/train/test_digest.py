import jax
import jax.numpy as jnp
import pytest

from jalign import sharding
from jalign.train import integrity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "int8"])
def test_same_on_every_mesh_and_sees_swaps_and_changes(dtype):
    x = (jnp.arange(64.0).reshape(16, 4) % 7).astype(dtype)
    plain = integrity.tree_digest({"x": x})
    for sizes in (dict(fsdp=8), dict(data=2, fsdp=4)):
        place = sharding.batch_sharding(sharding.make_mesh(**sizes))
        assert integrity.tree_digest({"x": jax.device_put(x, place)}) == plain
    swapped = x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0])
    assert integrity.tree_digest({"x": swapped}) != plain
    assert integrity.tree_digest({"x": x.T}) != plain


def test_specs_and_keys():
    tree = {"a": jnp.zeros((2, 3)), "k": jax.random.key(3)}
    bare = integrity.without_keys(tree)
    assert integrity.tree_specs(bare) == {"a": "float32[2,3]", "k": "uint32[2]"}
    again = integrity.with_keys(bare, tree)
    assert again["k"] == tree["k"]
