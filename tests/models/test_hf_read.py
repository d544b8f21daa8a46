"""Tests for jalign/models/hf_weights.py: strictness, sharded reading, golden logits."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jalign import sharding
from jalign.models import Model, load, read_config, save
from jalign.models.tensors import file_shape
from scripts import make_model_golden
from tests.models.tiny import (
    CONFIGS,
    FAMILY_CONFIGS,
    GOLDEN,
    golden_file,
    random_params,
)

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"


def make(folder, name="llama", change=lambda tensors: None):
    model = Model((CONFIGS | FAMILY_CONFIGS)[name])
    params = random_params(model)
    save(folder, model, params)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return params


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_logits_are_those_of_transformers(path, tmp_path):
    """Golden files are written by scripts/make_model_golden.py."""
    golden = np.load(path)
    raw, shapes = golden_file(path), json.loads(str(golden["shapes"]))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0.0, 0.3, shapes[name]).astype("f4") for name in sorted(shapes)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model, params = load(tmp_path)
    # Layer by layer, and not jitted: what one family has compiled serves the next.
    hidden, _ = model.replace(unroll=True).apply(
        params, golden["tokens"], segment_ids=golden["attention_mask"]
    )
    if model.config.num_labels:
        last = golden["attention_mask"].sum(1) - 1
        got = model.score(params, hidden)[np.arange(len(last)), last][:, None]
        np.testing.assert_allclose(got, golden["logits"], atol=1e-4)
        return
    real = golden["attention_mask"] > 0
    got = model.head(params).logits(hidden)
    np.testing.assert_allclose(got[real], golden["logits"][real], atol=1e-4)


def test_golden_files_are_there():
    assert {path.stem for path in GOLDEN} == set(make_model_golden.GOLDEN)


def test_all_problems_are_in_one_error(tmp_path):
    def change(tensors):
        del tensors[NORM]
        tensors["model.extra.weight"] = np.zeros(3, "f4")
        tensors[EMBED] = tensors[EMBED][:40]
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype("i8")

    make(tmp_path, change=change)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    text = str(error.value)
    for part in ("4 problem", f"missing tensor {NORM}", "unexpected", "(40, 24)", "I8"):
        assert part in text or (part == "I8" and "I64" in text)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    def change(tensors):
        tensors[NORM][3] = np.nan

    make(tmp_path, change=change)
    with pytest.raises(ValueError, match=f"{NORM} is not finite"):
        load(tmp_path)


def test_more_or_fewer_layers_than_the_config_are_refused(tmp_path):
    make(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for layers, message in ((1, "unexpected"), (3, "missing")):
        raw["num_hidden_layers"] = layers
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_copy_of_a_tied_embedding_must_be_equal(tmp_path):
    make(tmp_path, "llama3", lambda t: t.update({"lm_head.weight": t[EMBED].copy()}))
    load(tmp_path)
    make(tmp_path, "llama3", lambda t: t.update({"lm_head.weight": t[EMBED] + 1}))
    with pytest.raises(ValueError, match="unexpected tensor lm_head"):
        load(tmp_path)


def test_bad_config_names_its_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("qwen2", dict(fsdp=8)),
        # gate and up are one tensor, of which `tensor` cuts the inner axis.
        ("phi3", dict(data=2, fsdp=2, tensor=2)),
    ],
)
def test_sharded_reading_equals_whole_reading(tmp_path, name, sizes):
    want = make(tmp_path, name)
    model, params = load(tmp_path, mesh=sharding.make_mesh(**sizes))
    shardings = sharding.param_shardings(model.mesh, model.param_shapes())
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    jax.tree.map(np.testing.assert_array_equal, params, want)


def test_bfloat16_files_and_params(tmp_path):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    want = make(tmp_path, change=change)
    for dtype in (jnp.float32, jnp.bfloat16):
        _, params = load(tmp_path, param_dtype=dtype)
        q = params["layers"]["attention"]["q"]["kernel"]
        assert q.dtype == dtype
        rounded = want["layers"]["attention"]["q"]["kernel"].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(q.astype("f4"), rounded.astype("f4"))


def test_file_shape():
    assert file_shape("(n h) d -> d n h", (64, 8, 16)) == (128, 64)
    assert file_shape("d (n h) -> n h d", (8, 16, 64)) == (64, 128)
    assert file_shape("d -> d", (5,)) == (5,)


def test_real_checkpoint_tells_its_story(real_data):
    model, params = load(real_data / "stories260k")
    ids = [1, 410, 469, 347]  # "Zoo"
    apply = jax.jit(lambda tokens: model.apply(params, tokens)[0])
    for _ in range(6):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(ids)] = ids
        logits = apply(tokens)[0, len(ids) - 1] @ model.unembed(params)
        ids.append(int(logits.argmax()))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data / "stories260k")
    assert tokenizer.decode(ids[1:]).startswith("Zoo was a little girl")


def test_read_config_reads_no_weights(tmp_path):
    config = CONFIGS["llama"]
    save(tmp_path, Model(config), random_params(Model(config)))
    (tmp_path / "model.safetensors").unlink()
    assert read_config(tmp_path) == config
