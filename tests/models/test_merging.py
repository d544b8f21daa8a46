"""Tests for jalign/models/merging.py, weight_delta.py, hf_checkpoints.py: on files."""

import dataclasses
import functools
import json
import shutil
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jalign.models import Model, averaging, hf_writing, load, lora, save, save_adapter
from jalign.models.hf_checkpoints import Out, read
from jalign.models.hf_config import config_to_hf
from jalign.models.hf_files import WeightFiles
from jalign.models.lora import LoraConfig
from jalign.models.merging import average, merge_adapter
from jalign.models.quantize import NF4
from jalign.models.weight_delta import apply_delta, make_delta
from tests.models import bitsandbytes_files
from tests.models.adapters import random_adapters
from tests.models.tiny import CONFIGS, SIZES, random_params

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
SOME = LoraConfig(rank=4, rank_pattern=(("layers.0.*", 2),), train_full=("embed",))
ADAPTERS = {
    "llama": LoraConfig(rank=2, alpha=5, targets=("attention",), train_full=("head",)),
    "llama3": SOME,
    "qwen2": LoraConfig(rank=3, rank_stabilized=True),
    "reward": LoraConfig(rank=2, targets=("down_proj",)),
}


def saved(folder, name="llama", seed=0, dtype=jnp.float32, config=None, **how):
    """A model in a folder: (model, params)."""
    model = Model(config or CONFIGS[name])
    params = random_params(model, seed)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    save(folder, model, params, **how)
    return model, params


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """(a model in a folder, another of its config)."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        saved(folder, seed=seed)
    return folders


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(one, two):
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert x.dtype == two[name].dtype and x.tobytes() == two[name].tobytes(), name


def change(folder, name, value):
    """Another value of a tensor, None for none, in a model of one file."""
    tensors = load_file(folder / "model.safetensors") | {name: value}
    kept = {name: x for name, x in tensors.items() if x is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "bfloat16"),
        ("llama3", "float32"),
        ("qwen2", "float32"),
        ("reward", "bfloat16"),
    ],
)
def test_a_merged_adapter_is_the_merge_in_memory(name, dtype, tmp_path):
    model = Model(CONFIGS[name])
    causal = dataclasses.replace(model.config, num_labels=0)
    base, params = saved(tmp_path / "base", config=causal, dtype=dtype)
    adapters = random_adapters(model, ADAPTERS[name])
    save_adapter(tmp_path / "a", model, adapters, ADAPTERS[name], base="base")
    whole = lora.merge(lora.join(params, adapters))
    if model.config.num_labels:
        whole.pop("unembed")
    whole = jax.tree.map(lambda x: x.astype(dtype), whole)
    save(tmp_path / "want", model, whole)
    out = Out(tmp_path / "out", model.config)
    number = merge_adapter(tmp_path / "base", tmp_path / "a", out)
    got, want = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "want")
    assert number == len(got) and got.keys() == want.keys()
    before = tensors_of(tmp_path / "base")
    assert sum((got[key] != before.get(key)).any() for key in got) >= 3
    for key, x in got.items():
        assert x.dtype == want[key].dtype == dtype
        # A product of another shape may add in another order.
        rtol = 1e-6 if dtype == "float32" else 2**-8
        a, b = x.astype("f4"), want[key].astype("f4")
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6, err_msg=key)
    for file in ("config.json", "generation_config.json"):
        texts = [(tmp_path / folder / file).read_text() for folder in ("out", "want")]
        assert texts[0] == texts[1]


def test_files_are_cut_as_the_bases_are_and_dtypes_can_be_asked_for(tmp_path):
    model, _ = saved(tmp_path / "base", dtype="bfloat16", max_shard_size=9_000)
    config = LoraConfig(rank=2)
    adapters = random_adapters(model, config)
    save_adapter(tmp_path / "a", model, adapters, config, base="base")
    for folder, dtype in (("same", None), ("wide", "float32"), ("half", "float16")):
        out = Out(tmp_path / folder, model.config)
        merge_adapter(tmp_path / "base", tmp_path / "a", out, dtype)
    base, same, wide = (tmp_path / name for name in ("base", "same", "wide"))
    names = [sorted(f.name for f in folder.iterdir()) for folder in (base, same, wide)]
    assert names[0] == names[1] == names[2] and len(names[0]) > 5
    index = "model.safetensors.index.json"
    assert (base / index).read_text() == (same / index).read_text()
    size = json.loads((wide / index).read_text())["metadata"]["total_size"]
    assert size == 2 * json.loads((base / index).read_text())["metadata"]["total_size"]
    wide, half = tensors_of(wide), tensors_of(tmp_path / "half")
    for name, x in tensors_of(same).items():  # all rounded once, from float32
        assert wide[name].dtype == "float32" and half[name].dtype == "float16"
        np.testing.assert_array_equal(wide[name].astype("bfloat16"), x)
        np.testing.assert_array_equal(wide[name].astype("float16"), half[name])
    assert json.loads((same / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_few_tensors_are_in_memory_and_not_the_model(tmp_path, monkeypatch):
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 2048, "num_layers": 6}
    model, _ = saved(tmp_path / "base", config=dataclasses.replace(
        CONFIGS["llama"], **sizes
    ))  # fmt: skip
    config = LoraConfig(rank=1, targets=("up_proj", "down_proj"))
    adapters = random_adapters(model, config)
    save_adapter(tmp_path / "a", model, adapters, config, base="base")
    held, most, whole = [], [0], WeightFiles.read

    def count(self, name, *index):
        x = whole(self, name, *index)
        held.append(weakref.ref(x))
        most[0] = max(most[0], sum(ref() is not None for ref in held))
        return x

    tensor, model_size = 4 * 128 * 2048, 18 * 4 * 128 * 2048
    assert (tmp_path / "base/model.safetensors").stat().st_size > model_size
    tracemalloc.start()
    try:
        out = Out(tmp_path / "out", model.config)
        merge_adapter(tmp_path / "base", tmp_path / "a", out)
        _, peak = tracemalloc.get_traced_memory()
        assert peak < 3 * tensor, peak / tensor
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(WeightFiles, "read", count)
    folders = [tmp_path / "base", tmp_path / "out"]
    average(folders, lambda name, xs, base: averaging.linear(xs), out._replace(
        folder=tmp_path / "mean"
    ))  # fmt: skip
    # Of one name, and of the last one's, which jax lets go of a moment too late.
    assert 2 <= most[0] <= 4, most
    assert len(held) == 2 * len(tensors_of(tmp_path / "base")) > 8 * most[0]


def test_models_are_averaged_tensor_by_tensor(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for seed, folder in enumerate(folders):
        model, _ = saved(folder, "qwen2", seed)
    base, _ = saved(tmp_path / "base", "qwen2", 9)
    out, names = Out(tmp_path / "out", model.config), []

    added = jax.jit(functools.partial(averaging.task_arithmetic, scale=0.5))

    def combine(name, models, base):
        names.append(name)
        return added(models, base)

    number = average(folders, combine, out, base=tmp_path / "base")
    got, start = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base")
    inputs = [tensors_of(folder) for folder in folders]
    assert sorted(names) == sorted(got) and number == len(got) > 20
    for name in names:  # norms and biases too
        want = added([each[name] for each in inputs], start[name])
        np.testing.assert_array_equal(got[name], want)
    load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_of_equal_models_is_the_model_bit_for_bit(dtype, tmp_path):
    model, _ = saved(tmp_path / "a", dtype=dtype)
    average(
        [tmp_path / "a"] * 3,
        lambda name, models, base: averaging.linear(models),
        Out(tmp_path / "out", model.config),
    )
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "a"))


def config_like(name, **fields):
    return dataclasses.replace(CONFIGS[name], **fields)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (config_like("llama", rope_theta=5e5), "rope_theta is 10000.0 and 500000.0"),
        (config_like("llama", norm_eps=1e-5), "rms_norm_eps is 1e-06 and 1e-05"),
        (config_like("llama", tie_embeddings=True), "tie_word_embeddings is False and"),
        (config_like("llama", vocab_size=49), "vocab_size is 48 and 49"),
        (config_like("mistral"), "sliding_window is None and 5"),
        (config_like("reward"), "num_labels is 0 and 1"),
        (config_like("llama", max_position=4096, eos_token_ids=(3,)), None),
    ],
)
def test_models_that_compute_differently_are_refused(other, message, tmp_path, llamas):
    shutil.copytree(llamas[1], tmp_path / "b")
    texts = [json.dumps(x) for x in config_to_hf(other)]
    (tmp_path / "b/config.json").write_text(texts[0])
    folders = [llamas[0], tmp_path / "b"]
    out = Out(tmp_path / "out", CONFIGS["llama"])

    def run():
        average(folders, lambda name, models, base: averaging.linear(models), out)

    if message is None:  # these say nothing of what is computed
        return run()
    with pytest.raises(ValueError, match=message) as error:
        run()
    for folder in folders:
        assert str(folder) in str(error.value)
    assert not out.folder.exists()


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        (NORM, None, "missing tensor model.norm.weight"),
        (UP, np.zeros((40, 23), "f4"), r"up_proj.weight has shape \(40, 23\)"),
        (UP, np.zeros((40, 24), "i4"), "up_proj.weight has dtype I32"),
        ("model.more", np.zeros(3, "f4"), "unexpected tensor model.more"),
        (NORM, np.full(24, np.nan, "f4"), "model.norm.weight is not finite"),
    ],
)
def test_a_model_with_a_bad_tensor_is_named(tensor, value, message, tmp_path, llamas):
    shutil.copytree(llamas[1], tmp_path / "b")
    change(tmp_path / "b", tensor, value)
    folders, out = [llamas[0], tmp_path / "b"], tmp_path / "out"
    with pytest.raises(ValueError, match=message) as error:
        average(folders, lambda *x: x[1][0], Out(out, CONFIGS["llama"]))
    assert str(tmp_path / "b") in str(error.value)
    assert not (out / "config.json").exists() and not [*out.glob("*.tmp")]


def test_a_quantized_model_is_refused(tmp_path, llamas):
    shutil.copytree(llamas[0], tmp_path / "base")
    meant = bitsandbytes_files.rewrite(tmp_path / "base", NF4, nested=True)
    out = Out(tmp_path / "out", CONFIGS["llama"])
    text = f"base: .*q_proj.weight and {len(meant) - 1} more are quantized: give the"
    with pytest.raises(ValueError, match=f"(?s){text} full-precision model"):
        average([llamas[1], tmp_path / "base"], lambda *x: x[1][0], out)
    assert not out.folder.exists()


def test_what_does_not_fit_into_half_precision_is_named(tmp_path, llamas):
    shutil.copytree(llamas[0], tmp_path / "a")
    change(tmp_path / "a", NORM, np.float32([1e5] + 23 * [1]))
    out = Out(tmp_path / "out", CONFIGS["llama"])
    with pytest.raises(ValueError, match=f"{NORM} is not finite in float16.*--dtype"):
        average([tmp_path / "a"], lambda *x: x[1][0], out, dtype="float16")


@pytest.mark.parametrize("dtypes", ["float32 float32", "bfloat16 float32"])
def test_a_delta_gives_the_target_back_bit_for_bit(dtypes, tmp_path):
    of_target, of_base = dtypes.split()
    saved(tmp_path / "base", seed=1, dtype=of_base)
    model, params = saved(tmp_path / "target", dtype=of_target, max_shard_size=9_000)
    # Where base + (target - base) is not the target: small values, and -0.0.
    scaled = {name: x * 1e-9 for name, x in params["norm"].items()}
    params["norm"] = {"scale": scaled["scale"].at[3].set(-0.0)}
    save(tmp_path / "target", model, params, max_shard_size=9_000)
    delta, out = (Out(tmp_path / name, model.config) for name in ("delta", "out"))
    digest = make_delta(tmp_path / "target", tmp_path / "base", delta)
    assert apply_delta(tmp_path / "base", tmp_path / "delta", out) == digest
    want = tensors_of(tmp_path / "target")
    assert_same(tensors_of(tmp_path / "out"), want)
    names = sorted(f.name for f in (tmp_path / "target").iterdir())
    assert names == sorted(f.name for f in (tmp_path / "out").iterdir())
    with WeightFiles(tmp_path / "delta", "delta.safetensors") as files:
        start = load_file(tmp_path / "base/model.safetensors")[UP].astype("f8")
        got = read(files, UP)
        assert got.dtype == "float32" and len(files.note(UP).split()[1]) == 64
        np.testing.assert_allclose(got, want[UP].astype("f8") - start, atol=1e-7)
        exact = files.read(f"{NORM}.exact_at")
        assert 3 in exact and len(exact) == len(files.read(f"{NORM}.exact"))
    with pytest.raises(FileNotFoundError):  # nothing takes a delta for a model
        load(tmp_path / "delta")


def test_a_delta_with_another_base_is_refused(tmp_path, llamas):
    target, base = llamas
    out = Out(tmp_path / "delta", CONFIGS["llama"])
    make_delta(target, base, out)
    shutil.copytree(base, tmp_path / "base")
    change(tmp_path / "base", UP, np.ones((40, 24), "f4"))
    other = out._replace(folder=tmp_path / "out")
    with pytest.raises(ValueError, match=f"{UP} of .*base with .*delta is not the"):
        apply_delta(tmp_path / "base", tmp_path / "delta", other)
    assert not (tmp_path / "out/config.json").exists()
    file = tmp_path / "delta/delta.safetensors"
    tensors = load_file(file)
    save_file({UP: tensors[UP].T.copy(), NORM: tensors[NORM]}, file)
    with pytest.raises(ValueError) as error:
        apply_delta(tmp_path / "base", tmp_path / "delta", other)
    for words in (
        f"missing tensor {EMBED}",
        f"{UP} is F32 (24, 40), and has to be F32 (40, 24)",
        f"{NORM} has no digest",
    ):
        assert words in str(error.value)


def test_a_reward_models_delta_holds_its_head_whole(tmp_path, llamas):
    base = llamas[0]
    model, _ = saved(tmp_path / "target", "reward")
    delta, out = (Out(tmp_path / name, model.config) for name in ("delta", "out"))
    make_delta(tmp_path / "target", base, delta)
    apply_delta(base, tmp_path / "delta", out)
    got = tensors_of(tmp_path / "out")
    assert_same(got, tensors_of(tmp_path / "target"))
    assert "score.weight" in got
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_a_file_that_grows_is_whole_or_not_there(tmp_path):
    arrays = {
        "wide": np.arange(6, dtype="f4").reshape(2, 3),
        "half": np.arange(3, dtype="f4").astype("bfloat16"),
        "none": np.zeros((0, 4), "f4"),
    }

    def write(make):
        return hf_writing.write_shards(tmp_path, [[*arrays]], make)

    def note(name):
        return hf_writing.Written({name: arrays[name]}, f"of {name}")

    assert write(note) == {"model.safetensors"}
    assert_same(load_file(tmp_path / "model.safetensors"), arrays)
    with WeightFiles(tmp_path) as files:
        assert files.note("half") == "of half"
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(name):
        if name == "half":
            raise OSError("the disk is full")
        return hf_writing.Written({name: arrays[name] + 1})

    with pytest.raises(OSError, match="full"):
        write(fail)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
