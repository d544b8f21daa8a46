"""Tests for jalign/models/hf_quantized.py: codes made while reading, or taken over."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jalign import sharding
from jalign.models import Model, families, load, quantized, save, tensors
from jalign.models.hf_config import config_from_hf, config_to_hf
from jalign.models.quantize import NF4
from tests.models import bitsandbytes_files
from tests.models.tiny import CONFIGS, random_params

SIZES = dict(hidden_size=128, intermediate_size=192, head_dim=32)
CONFIG = dataclasses.replace(CONFIGS["qwen2"], **SIZES)
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """Weights as of a bfloat16 model; norms and biases are none of 0 and 1."""
    params = jax.tree.map(
        lambda x: x.astype(ml_dtypes.bfloat16), random_params(Model(CONFIG))
    )
    save(tmp_path, Model(CONFIG), params)
    return tmp_path


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_codes_made_while_reading_are_those_of_the_whole_model(folder, method):
    model, floats = load(folder)
    want = jax.jit(quantized.quantize_params, static_argnums=1)(floats, method)
    _, params = load(folder, quantize=method)
    jax.tree.map(np.testing.assert_array_equal, params, want)
    # The dtype of parameters is that of what stays: codes are of the file's values.
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
    _, cut = load(folder, quantize=method, mesh=mesh, param_dtype=jnp.bfloat16)
    assert cut["embed"]["embedding"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, cut["layers"], want["layers"])
    where = sharding.param_shardings(mesh, jax.eval_shape(lambda x: x, params))
    assert jax.tree.map(lambda x: x.sharding, cut) == where


def test_memory_is_a_layer_and_codes(tmp_path):
    """Of the host's, as NumPy allocates it: less than one stack of kernels."""
    wide = dict(num_layers=12, intermediate_size=1024)
    model = Model(dataclasses.replace(CONFIG, **wide))
    save(tmp_path, model, random_params(model))
    load(tmp_path, quantize="nf4")  # what is compiled, and imported, stays
    layer = 128 * 1024 * 4
    peaks = []
    for method in ("nf4", None):
        tracemalloc.start()
        load(tmp_path, quantize=method)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 8 * layer < 12 * layer < peaks[1], [p / layer for p in peaks]


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_files_mean_what_their_tables_say(folder, nested):
    meant = bitsandbytes_files.rewrite(folder, NF4, nested)
    assert len(meant) == 14
    model, params = load(folder)
    whole = quantized.dequantize_params(params, model.param_shapes())
    for row in families.tensors_of(model.config):
        if not tensors.is_linear(row.path):
            continue
        leaf = whole
        for name in row.path.split("/"):
            leaf = leaf[name]
        for i, name in enumerate(row.names(leaf.shape)):
            inputs = int(np.prod(leaf.shape[1 : 1 + row.num_inputs]))
            rows = np.asarray(leaf[i]).reshape(inputs, -1).T
            np.testing.assert_allclose(rows, meant[name], rtol=0, atol=1e-6)
    # A second rounding would move codes: ours of the same weights are theirs.
    _, again = load(folder, quantize="nf4", mesh=sharding.make_mesh(fsdp=8))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ValueError, match="stored in nf4.*int8.*leave quantize out"):
        load(folder, quantize="int8")


def test_codes_taken_over_are_those_made_here(folder):
    _, made = load(folder, quantize="nf4")
    bitsandbytes_files.rewrite(folder, NF4, nested=True)
    _, taken = load(folder)
    for part in ("nf4", "nested_absmax", "nested_offset"):
        for name in ("gate", "up", "down"):
            got, want = (x["layers"]["mlp"][name]["kernel"] for x in (taken, made))
            np.testing.assert_allclose(got[part], want[part], rtol=1e-5)


def _state(tensors, **changes):
    name = UP + ".quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes()) | changes
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)


def _drop(*suffixes):
    return lambda tensors: [tensors.pop(UP + suffix) for suffix in suffixes]


ALL = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
ALL += (".quant_state.bitsandbytes__nf4",)


def _as_floats(tensors):
    _drop(*ALL)(tensors)
    tensors[UP] = np.ones((192, 128), "f4")


@pytest.mark.parametrize(
    "edit, message",
    [
        (_drop(".absmax"), f"missing tensor {UP}.absmax"),
        (_drop(".quant_state.bitsandbytes__nf4"), f"missing tensor {UP}.quant_state"),
        (_as_floats, f"{UP} is not in 4 bits, but other"),
        (lambda t: t.update({UP: t[UP][:-1]}), r"\(12287, 1\), .* \(12288, 1\)"),
        (lambda t: t.update({UP + ".g_idx": t[UP]}), "unexpected tensor .*g_idx"),
        (lambda t: t.update({UP + ".quant_map": NF4[::-1].copy()}), "its quant_map"),
        (lambda t: _state(t, quant_type="fp4"), "quant_type is 'fp4', not 'nf4'"),
        (lambda t: _state(t, blocksize=128), "blocksize is 128, not 64"),
        (lambda t: _state(t, shape=[128, 192]), "shape is"),
        (lambda t: _state(t, nested_offset=None), "nested_offset is None"),
        (lambda t: t[UP + ".nested_absmax"].fill(np.nan), "not finite"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_damaged_bitsandbytes_files_are_named(folder, edit, message):
    bitsandbytes_files.rewrite(folder, NF4, nested=True)
    change(folder, edit)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value) and UP in str(error.value)


def test_blocks_over_the_ends_of_rows_are_refused(tmp_path):
    model = Model(dataclasses.replace(CONFIG, intermediate_size=172))
    save(tmp_path, model, random_params(model))
    _, params = load(tmp_path, quantize="nf4")  # ours end with the row
    assert params["layers"]["mlp"]["down"]["kernel"]["nf4"].shape == (2, 3, 32, 128)
    bitsandbytes_files.rewrite(tmp_path, NF4, nested=False)
    with pytest.raises(ValueError, match='down_proj.*172.*quantize="nf4"'):
        load(tmp_path)


def test_other_methods_are_refused_by_name(folder):
    with pytest.raises(ValueError, match="'fp4' is not one of nf4, int8"):
        load(folder, quantize="fp4")
    raw = config_to_hf(CONFIG)[0]
    in_4_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    nf4 = {"bnb_4bit_quant_type": "nf4"}
    assert config_from_hf(raw | {"quantization_config": in_4_bits | nf4}) == CONFIG
    for given, message in [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"bits": 4}, "of no quant_method"),
        ("awq", "awq"),
        (in_4_bits, "bitsandbytes fp4"),
        (
            in_4_bits | nf4 | {"bnb_4bit_quant_storage": "bfloat16"},
            "bitsandbytes nf4 .* bfloat16",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            "bitsandbytes int8 .LLM.int8.",
        ),
    ]:
        with pytest.raises(ValueError, match=f"quantization_config: {message}.*full-"):
            config_from_hf(raw | {"quantization_config": given})
    with pytest.raises(ValueError, match="quantization_config.*full-precision"):
        config_from_hf(raw | {"compression_config": {"format": "pack-quantized"}})
