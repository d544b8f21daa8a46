"""Live comparison with peft on torch: adapters in, gradients, adapters out."""

import functools
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file  # noqa: E402

from jalign.models import load, load_adapter, lora, save_adapter  # noqa: E402
from jalign.models.lora import LoraConfig  # noqa: E402
from scripts.make_model_golden import CASES, build, inputs  # noqa: E402
from tests.models.adapters import random_adapters  # noqa: E402

TOLERANCE = 1e-5
MODELS = ("llama", "mistral_window", "qwen2", "qwen3")
# Sorted, as PEFT saves them, the patterns come in this order too.
OVERLAPPING = {
    "rank_pattern": {"layers.0.*": 2, "q_proj": 3},
    "alpha_pattern": {"layers.1.mlp.*": 5, "up_proj": 7},
}
ADAPTERS = {
    "all": {"target_modules": "all-linear", "lora_alpha": 6},
    "q and v": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 4},
    "rslora": {"target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    "patterns": {"target_modules": "all-linear", **OVERLAPPING},
    "layers": {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [1]},
}


def adapted(name, **config):
    """A peft model whose A and B are random, drawn from one seed."""
    torch.manual_seed(0)
    task = "SEQ_CLS" if "num_labels" in CASES[name][1] else "CAUSAL_LM"
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type=task, **config)
    return peft.get_peft_model(build(*CASES[name]), config)


def torch_logits(model):
    tokens, mask = inputs()
    with torch.no_grad():
        out = model.eval()(torch.tensor(tokens), attention_mask=torch.tensor(mask))
    return out.logits.numpy()


def jalign_logits(model, params, adapters):
    tokens, mask = inputs()
    joined = lora.join(params, adapters)
    if model.config.num_labels:
        hidden, _ = model.apply(joined, tokens, segment_ids=mask)
        scores = np.asarray(model.score(joined, hidden))
        return scores[np.arange(3), mask.sum(1) - 1][:, None]
    return np.asarray(model.logits(joined, tokens, segment_ids=mask))


def read_by_peft(folder, base):
    """The adapter on a new base model; a warning of peft's fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, for torch
        return peft.PeftModel.from_pretrained(base, folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> (the base's folder, its logits, model and parameters)."""

    @functools.cache
    def base(name):
        folder = tmp_path_factory.mktemp(name)
        theirs = build(*CASES[name])
        theirs.save_pretrained(folder)
        model, params = load(folder, attention="plain")
        model = model.replace(unroll=True)  # op by op: few things to compile
        return folder, torch_logits(theirs), model, params

    return base


def compare(name, theirs, base, folder):
    """peft's folder in, logits; jalign's folder out, the same bytes and logits."""
    path, before, model, params = base
    theirs.save_pretrained(folder / "theirs")
    adapters, config = load_adapter(folder / "theirs", model)
    want, got = torch_logits(theirs), jalign_logits(model, params, adapters)
    real = slice(None) if model.config.num_labels else inputs()[1] > 0
    np.testing.assert_allclose(got[real], want[real], atol=TOLERANCE)
    assert np.abs(want[real] - before[real]).max() > 0.1  # it does something
    save_adapter(folder / "ours", model, adapters, config, base=str(path))
    file = "adapter_model.safetensors"
    one, two = (folder / side / file for side in ("theirs", "ours"))
    assert one.read_bytes() == two.read_bytes()
    again = read_by_peft(folder / "ours", build(*CASES[name]))
    np.testing.assert_array_equal(torch_logits(again), want)


@pytest.mark.parametrize("how", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_in_and_out(name, how, bases, tmp_path):
    compare(name, adapted(name, **ADAPTERS[how]), bases(name), tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "phi3"])
def test_kernels_transposed_in_groups_and_joined(name, bases, tmp_path):
    theirs = adapted(name, target_modules="all-linear", lora_alpha=6)
    compare(name, theirs, bases(name), tmp_path)


@pytest.mark.parametrize("name", ["llama_reward", "qwen3_reward"])
def test_scores_in_and_out(name, bases, tmp_path):
    theirs = adapted(name, target_modules="all-linear")
    compare(name, theirs, bases(name), tmp_path)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradients_are_pefts(name, bases, tmp_path):
    tokens, mask = inputs()
    theirs = adapted(name, **ADAPTERS["patterns"]).train()
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(3, 12, 48)).astype("f4") * mask[..., None]
    out = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask))
    (out.logits * torch.tensor(weights)).sum().backward()
    want = {
        key.replace(".default", ""): x.grad.numpy()
        for key, x in theirs.named_parameters()
        if x.grad is not None
    }
    theirs.save_pretrained(tmp_path / "theirs")
    _, _, model, params = bases(name)
    if name == "llama":  # as on a CPU by default
        model = model.replace(attention="auto", unroll=None)
    adapters, config = load_adapter(tmp_path / "theirs", model)
    trained, scales = lora.trainable(adapters)

    def total(trained):
        joined = lora.join(lora.join(params, scales), trained)
        logits = model.logits(joined, tokens, segment_ids=mask)
        return (logits * weights).sum()

    found = jax.jit(jax.grad(total))(trained)
    # As a file they have peft's names and shapes, and nothing beyond a layer's rank.
    save_adapter(tmp_path / "ours", model, lora.join(scales, found), config, base="x")
    got = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    largest = max(np.abs(x).max() for x in want.values())
    for key, x in got.items():
        np.testing.assert_allclose(x, want[key], rtol=0, atol=1e-5 * largest)


OURS = {
    "llama_tied": LoraConfig(
        rank=4,
        rank_pattern=(("layers.1.*", 2), ("(.*)_proj", 3), ("down_proj", 0)),
        alpha_pattern=(("up_proj", 2.5), ("mlp.*", 9.0)),
        train_full=("embed",),
    ),
    "qwen3": LoraConfig(rank=2, targets=("mlp",), train_full=("embed", "head")),
    "llama_reward": LoraConfig(rank=2, rank_pattern=(("layers.0.*", 0),)),
    "qwen2_moe": LoraConfig(rank=2),
}


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_jalign_made(name, bases, tmp_path):
    path, _, model, params = bases(name)
    adapters = random_adapters(model, OURS[name])
    save_adapter(tmp_path, model, adapters, OURS[name], base=str(path))
    want = jalign_logits(model, params, adapters)
    got = torch_logits(read_by_peft(tmp_path, build(*CASES[name])))
    real = slice(None) if model.config.num_labels else inputs()[1] > 0
    np.testing.assert_allclose(got[real], want[real], rtol=1e-5, atol=1e-5)
