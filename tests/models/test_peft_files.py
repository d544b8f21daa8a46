"""Tests for jalign/models/peft_files.py, peft_checks.py, peft_config.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jalign import sharding
from jalign.models import Model, load, load_adapter, lora, save, save_adapter
from jalign.models.hf_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jalign.models.lora import LoraConfig
from tests.models.adapters import random_adapters
from tests.models.tiny import CONFIGS, random_params

P = "base_model.model."
Q0 = P + "model.layers.0.self_attn.q_proj."
EMBED, HEAD = P + "model.embed_tokens.weight", P + "lm_head.weight"
SOME = LoraConfig(
    rank=4,
    alpha=6,
    rank_pattern=(("layers.0.*", 2), ("q_proj", 3), ("down_proj", 0)),
    alpha_pattern=(("self_attn.*", 5.5),),
    train_full=("embed",),
)
ADAPTERS = {
    "all": ("llama", LoraConfig(rank=4)),
    "tied and by patterns": ("llama3", SOME),
    "reward": ("reward", LoraConfig(rank=2, alpha=3, rank_stabilized=True)),
    "attention and head": (
        "qwen2",
        LoraConfig(rank=2, targets=("attention",), train_full=("head",)),
    ),
}


def write(folder, name="llama", config=None, **how):
    """A saved adapter: (model, adapters)."""
    config = config or LoraConfig(rank=4, targets=("q_proj", "down_proj"))
    model = Model(CONFIGS[name])
    adapters = random_adapters(model, config)
    save_adapter(folder, model, adapters, config, base="the/base", **how)
    return model, adapters


def change(folder, tensors=None, **keys):
    """Other tensors (None removes one) and keys in a saved adapter."""
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    if tensors:
        all_ = load_file(folder / ADAPTER_WEIGHTS) | tensors
        kept = {name: x for name, x in all_.items() if x is not None}
        save_file(kept, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def raw(folder):
    return json.loads((folder / ADAPTER_CONFIG).read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return folder, *write(folder)


@pytest.fixture
def good(written, tmp_path):
    """A copy of a saved adapter of q_proj and down_proj: (model, adapters)."""
    folder, model, adapters = written
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return model, adapters


@pytest.mark.parametrize("case", ADAPTERS)
def test_round_trip_is_exact(case, tmp_path):
    name, config = ADAPTERS[case]
    model, adapters = write(tmp_path, name, config)
    again, read = load_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    save_adapter(tmp_path / "two", model, again, read, base="the/base")
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def by_file(folder, base):
    """W + s B A of a folder's adapters, float64, by PEFT's own formula and names."""
    tensors, said = load_file(folder / ADAPTER_WEIGHTS), raw(folder)
    found = {name: x.astype(np.float64) for name, x in base.items()}
    for name, a in tensors.items():
        module = name.removeprefix(P).removesuffix(".lora_A.weight")
        if ".lora_A." in name:
            b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
            alpha = said["alpha_pattern"].get(
                ".".join(module.split(".")[-2:-1]) + ".*", said["lora_alpha"]
            )
            root = np.sqrt(len(a)) if said["use_rslora"] else len(a)
            found[module + ".weight"] += alpha / root * (b @ a)
        elif ".lora_" not in name:
            found[name.removeprefix(P)] = tensors[name].astype(np.float64)
    return found


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_file_holds_what_merging_adds(case, tmp_path):
    name, config = ADAPTERS[case]
    model, adapters = write(tmp_path / "adapter", name, config)
    params = random_params(model)
    save(tmp_path / "base", model, params)
    save(tmp_path / "merged", model, lora.merge(lora.join(params, adapters)))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    want = by_file(
        tmp_path / "adapter", load_file(tmp_path / "base" / "model.safetensors")
    )
    want.pop("lm_head.weight" if model.config.tie_embeddings else None, None)
    assert merged.keys() == want.keys()
    for tensor, x in merged.items():
        np.testing.assert_allclose(x, want[tensor], rtol=1e-6, atol=1e-6)


def test_names_shapes_and_keys_are_pefts(tmp_path):
    write(tmp_path, "llama3", SOME, dropout=0.1)
    shapes = {k: x.shape for k, x in load_file(tmp_path / ADAPTER_WEIGHTS).items()}
    assert shapes[Q0 + "lora_A.weight"] == (2, 24)
    assert shapes[Q0 + "lora_B.weight"] == (40, 2)
    layer = P + "model.layers.1."
    assert shapes[layer + "self_attn.q_proj.lora_A.weight"] == (3, 24)
    assert shapes[layer + "self_attn.o_proj.lora_A.weight"] == (4, 40)
    assert shapes[layer + "mlp.gate_proj.lora_B.weight"] == (40, 4)
    assert not [name for name in shapes if name.startswith(layer + "mlp.down_proj")]
    assert shapes[EMBED] == shapes[HEAD] == (48, 24)
    assert len(shapes) == 2 * (7 + 6) + 2
    said = raw(tmp_path)
    assert said["rank_pattern"] == {"layers.0.*": 2, "q_proj": 3}
    assert said["alpha_pattern"] == {"self_attn.*": 5.5}
    assert len(said["target_modules"]) == 13 and said["ensure_weight_tying"] is True
    assert said["modules_to_save"] == ["embed_tokens"]
    assert (said["r"], said["lora_alpha"], said["lora_dropout"]) == (4, 6, 0.1)
    write(tmp_path, "reward", LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    said = raw(tmp_path)
    assert said["target_modules"] == ["q_proj", "v_proj"]
    assert (said["task_type"], said["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert said["base_model_name_or_path"] == "the/base"


def test_patterns_whose_order_matters_are_written_so_that_it_does_not(tmp_path):
    pairs = (("layers.1.*", 2), ("(.*)_proj", 3))  # sorted, the other comes first
    config = LoraConfig(rank=4, targets=("q_proj",), rank_pattern=pairs)
    model, adapters = write(tmp_path, config=config)
    ranks = {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.1.self_attn.q_proj": 2,
    }
    assert raw(tmp_path)["rank_pattern"] == ranks
    again, _ = load_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_a_mesh_gives_the_same_file_and_gets_the_same_adapters(tmp_path):
    config = LoraConfig(rank=4, rank_pattern=(("k_proj", 2),), train_full=("head",))
    model, adapters = write(tmp_path / "one", config=config)
    mesh = sharding.make_mesh(fsdp=2, tensor=2, data=2)
    placed, config_read = load_adapter(tmp_path / "one", model.replace(mesh=mesh))
    a = placed["layers"]["mlp"]["down"]["lora_a"]
    assert a.sharding.shard_shape(a.shape) == (2, 20, 4)
    save_adapter(tmp_path / "two", model, placed, config_read, base="the/base")
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        one, two = tmp_path / "one" / file, tmp_path / "two" / file
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("layers", [[0], 0], ids=str)
def test_layers_without_an_adapter_stay_without(layers, good, tmp_path):
    model, _ = good
    gone = {
        name: None for name in load_file(tmp_path / ADAPTER_WEIGHTS) if ".1." in name
    }
    change(
        tmp_path,
        gone,
        layers_to_transform=layers,
        target_modules=["q_proj", "down_proj"],
    )
    adapters, config = load_adapter(tmp_path, model)
    assert config.rank_pattern == (
        ("model.layers.1.self_attn.q_proj", 0),
        ("model.layers.1.mlp.down_proj", 0),
    )
    q = adapters["layers"]["attention"]["q"]
    assert q["lora_scale"].tolist() == [8.0, 0.0] and not np.any(q["lora_a"][1])
    fresh = lora.init(model, random_params(model), config, jax.random.key(0))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapters)
    save_adapter(tmp_path / "two", model, adapters, config, base="the/base")
    assert len(raw(tmp_path / "two")["target_modules"]) == 2
    assert load_adapter(tmp_path / "two", model)[1] == config


WRITERS = {
    "nothing that is not needed": dict.fromkeys(
        ["alpha_pattern", "bias", "fan_in_fan_out", "modules_to_save", "rank_pattern"]
    ),
    "empty lists": {"target_parameters": [], "modules_to_save": [], "revision": ""},
    "empty mappings": {"loftq_config": {}, "layer_replication": {}, "new_key": {}},
    "full names": {
        "target_modules": [
            f"model.layers.{i}.{m}"
            for i in (0, 1)
            for m in ("self_attn.q_proj", "mlp.down_proj")
        ]
    },
    "a regex": {
        "target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|down)_proj"
    },
    "no target_modules": {"target_modules": None},
    "excluded": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "exclude_modules": ["k_proj"],
    },
    "layers": {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "of the start only": {"init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}},
    "of the training only": {"lora_dropout": 0.05, "peft_version": "0.21.2"},
    "a score that is not there": {"modules_to_save": ["classifier", "classifier"]},
}


@pytest.mark.parametrize("how", WRITERS)
def test_what_other_writers_say_differently_means_the_same(how, good, tmp_path):
    model, adapters = good
    change(tmp_path, **WRITERS[how])
    again, config = load_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert config == LoraConfig(rank=4, alpha=32, targets=("q_proj", "down_proj"))


@pytest.mark.parametrize("layout", ["", ".modules_to_save", ".modules_to_save.default"])
def test_full_copies_in_each_layout_and_unasked(layout, tmp_path, caplog):
    config = LoraConfig(rank=2, targets=("q_proj",), train_full=("embed", "head"))
    model, adapters = write(tmp_path, config=config)
    kept = load_file(tmp_path / ADAPTER_WEIGHTS)
    moved = {
        name.replace(".weight", f"{layout}.weight"): kept[name]
        for name in (EMBED, HEAD)
    }
    moved[EMBED.replace(".weight", ".original_module.weight")] = kept[EMBED] + 1
    change(tmp_path, {EMBED: None, HEAD: None} | moved)
    again, read = load_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert read.train_full == ("embed", "head") and not caplog.text
    change(tmp_path, modules_to_save=None)
    again, read = load_adapter(tmp_path, model)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert read.train_full == ("embed", "head")
    assert "its own embed replaces the base's" in caplog.text


def test_a_tensor_that_is_there_by_two_names_is_refused(good, tmp_path):
    wrapped = HEAD.replace(".weight", ".modules_to_save.weight")
    change(tmp_path, dict.fromkeys((HEAD, wrapped), np.ones((48, 24), np.float32)))
    with pytest.raises(ValueError, match="lm_head.weight and .* are the same tensor"):
        load_adapter(tmp_path, good[0])


def test_narrow_tensors_are_read_as_float32(good, tmp_path):
    model, adapters = good
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapters)
    config = LoraConfig(rank=4, targets=("q_proj", "down_proj"))
    save_adapter(tmp_path, model, narrow, config, base="the/base")
    again, _ = load_adapter(tmp_path, model)
    want = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    jax.tree.map(np.testing.assert_array_equal, again, want)


A = np.ones((4, 24), np.float32)
ONE = np.ones(4, np.float32)
BAD = {
    "no config": ({}, {}, "has no adapter_config.json"),
    "other kind": ({"peft_type": "IA3"}, {}, "peft_type='IA3' is not supported"),
    "dora": ({"use_dora": True}, {}, "use_dora=True: DoRA"),
    "dora's tensor": ({}, {Q0 + "lora_magnitude_vector": ONE}, "_vector: DoRA"),
    "bias": ({"bias": "all"}, {}, "bias='all'"),
    "bias's tensor": ({}, {Q0 + "base_layer.bias": ONE}, "layer.bias: a trained bias"),
    "bias of B": ({"lora_bias": True}, {}, "lora_bias=True"),
    "rank": ({"r": 8}, {}, "has rank 4, and 8 by r and rank_pattern"),
    "rank of one": ({"rank_pattern": {"q_proj": 2}}, {}, "lora_B.weight has rank 4"),
    "A without B": ({}, {Q0 + "lora_B.weight": None}, "missing .*q_proj.lora_B.weight"),
    "half": (
        {},
        {Q0 + "lora_A.weight": None, Q0 + "lora_B.weight": None},
        "missing tensor .*0.self_attn.q_proj.lora_A.weight",
    ),
    "untold": ({"target_modules": ["q_proj"]}, {}, "down_proj.*does not target its"),
    "unknown module": ({}, {P + "model.visual.lora_A.weight": A}, "visual.*linear map"),
    "of the head": ({}, {P + "lm_head.lora_A.weight": A}, "lm_head.*merge it into"),
    "of the embedding": (
        {},
        {P + "model.embed_tokens.lora_embedding_A": A},
        "embedding_A: an adapter of the embedding",
    ),
    "kernel": ({}, {Q0 + "weight": A}, "a full copy of a part of a layer"),
    "layer": (
        {},
        {Q0.replace(".0.", ".2.") + "lora_A.weight": A},
        "layers.2.self_attn.*: the base has 2 layers",
    ),
    "not finite": ({}, {Q0 + "lora_A.weight": A * np.nan}, "weight is not finite"),
    "integers": ({}, {Q0 + "lora_A.weight": A.astype(np.int8)}, "has dtype I8"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4' has changed"),
    "experts": ({"target_parameters": ["w"]}, {}, r"target_parameters=\['w'\]"),
    "tokens": ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    "base": ({}, {Q0 + "lora_A.weight": A[:, :9]}, r"\(4, 9\), for this base \(4"),
    "resized": ({}, {HEAD: np.ones((49, 24), "f4")}, "of 49 tokens, its base of 48"),
    "missing copy": ({"modules_to_save": ["lm_head"]}, {}, "missing tensor .*lm_head"),
    "norm": ({}, {P + "model.norm.weight": ONE}, "unexpected tensor .*; merge it into"),
    "unknown key": ({"use_novelty": True}, {}, "use_novelty=True is a key that jalign"),
    "kind of value": ({"r": 4.0}, {}, "r=4.0 is not a int"),
    "kind of pattern": ({"rank_pattern": {"q": "x"}}, {}, "rank_pattern: q='x'"),
    "kind of names": ({"target_modules": [1]}, {}, r"modules=\[1\] is not a list"),
    "regex": ({"target_modules": "("}, {}, r"'\(' is not a regex"),
    "regex in a regex": ({"rank_pattern": {"(?i)q": 2}}, {}, r"q' is not a regex"),
    "regex of layers": ({"layers_pattern": "(?P<layer>a)"}, {}, "is not a regex"),
    "task": ({"task_type": "TOKEN_CLS"}, {}, "task_type='TOKEN_CLS'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_folder_is_refused_by_file_and_key(what, good, tmp_path):
    model, _ = good
    keys, tensors, message = BAD[what]
    change(tmp_path, tensors, **keys)
    if what == "no config":
        (tmp_path / ADAPTER_CONFIG).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_adapter(tmp_path, model)
    assert str(tmp_path) in str(error.value)


def test_pickles_and_heads_of_other_tools_are_refused(good, tmp_path):
    model, _ = good
    (tmp_path / "value_head.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="value_head.safetensors is a reward head"):
        load_adapter(tmp_path, model)
    (tmp_path / ADAPTER_WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors.*\.bin"):
        load_adapter(tmp_path, model)


def test_a_reward_model_needs_its_head_and_a_language_model_has_none(tmp_path):
    model, _ = write(tmp_path, "reward")
    with pytest.raises(ValueError, match="score.weight: the model has no scalar head"):
        load_adapter(tmp_path, Model(CONFIGS["llama"]))
    change(tmp_path, {P + "score.weight": None})
    with pytest.raises(ValueError, match="missing .*score.weight: train reward models"):
        load_adapter(tmp_path, model)


def test_a_tied_embedding_is_one_matrix(tmp_path):
    config = LoraConfig(rank=2, targets=("q_proj",), train_full=("embed",))
    model, _ = write(tmp_path, "llama3", config)
    change(tmp_path, {HEAD: np.zeros((48, 24), np.float32)})
    with pytest.raises(ValueError, match="lm_head.weight is not .*embed_tokens"):
        load_adapter(tmp_path, model)
    change(tmp_path, {HEAD: None}, ensure_weight_tying=False)
    with pytest.raises(ValueError, match="trained without the head"):
        load_adapter(tmp_path, model)


def test_what_does_not_fit_together_is_not_written(good, tmp_path):
    model, adapters = good
    config = LoraConfig(rank=4, targets=("q_proj", "down_proj"))

    def refused(message, adapters=adapters, config=config, model=model):
        with pytest.raises(ValueError, match=message):
            save_adapter(tmp_path / "bad", model, adapters, config, base="x")
        assert not (tmp_path / "bad").exists()

    q = adapters["layers"]["attention"]["q"]

    def with_q(**leaves):
        return lora.join(adapters, {"layers": {"attention": {"q": q | leaves}}})

    refused(
        "mlp/down/lora_a is .* it is not there",
        config=LoraConfig(4, targets=("q_proj",)),
    )
    refused("lora_a is .*24, 4", config=LoraConfig(3, targets=("q_proj", "down_proj")))
    refused("lora_scale is 8.0 in layer 0", config=LoraConfig(4, 9.0, config.targets))
    refused("q/lora_b is not finite", with_q(lora_b=q["lora_b"] * np.inf))
    other = (("layers.1.*", 2),)
    half = LoraConfig(4, 32.0, config.targets, rank_pattern=other)
    scale = q["lora_scale"] * np.array([1, 2], np.float32)
    refused("is not 0 beyond rank 2, layer 1", with_q(lora_scale=scale), half)
    refused("two heads", model=model.replace(value_head=True))


def test_load_names_what_takes_an_adapter(good, tmp_path):
    with pytest.raises(ValueError, match="holds an adapter only: load_pretrained"):
        load(tmp_path)
