"""Tests for jalign/models/hf_weights.py: writing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jalign import sharding
from jalign.models import Model, load, save
from tests.models.tiny import CONFIGS, random_params


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_round_trip_is_exact(tmp_path, name):
    model = Model(CONFIGS[name])
    params = random_params(model)
    save(tmp_path, model, params)
    read, again = load(tmp_path)
    assert read == model
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_shards_from_a_mesh_with_an_index(tmp_path):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    model = Model(CONFIGS["llama"], mesh=mesh)
    params = model.init(jax.random.key(0))
    save(tmp_path, model, params, max_shard_size=9_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and f"of-{len(files):05d}" in files[0].name
    assert max(f.stat().st_size for f in files) < 9_000 + 2_000  # and the header
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    size = sum(x.size * 4 for x in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == size
    _, again = load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_an_older_checkpoint_is_replaced_and_nothing_else(tmp_path):
    model = Model(CONFIGS["llama"])
    params = random_params(model)
    (tmp_path / "notes.txt").write_text("keep")
    save(tmp_path, model, params, max_shard_size=9_000)
    save(tmp_path, model, params)
    names = sorted(f.name for f in tmp_path.iterdir())
    json_files = ["config.json", "generation_config.json"]
    assert names == [*json_files, "model.safetensors", "notes.txt"]


def test_bfloat16_is_kept_and_named(tmp_path):
    model = Model(CONFIGS["llama"])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(model))
    save(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == (
        "bfloat16"
    )
    _, again = load(tmp_path, param_dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_params_of_another_model_are_refused(tmp_path):
    model = Model(CONFIGS["llama"])
    with pytest.raises(ValueError, match="names and shapes"):
        save(tmp_path, model, random_params(Model(CONFIGS["qwen2"])))
