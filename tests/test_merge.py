"""Tests for jalign/merge.py: `jalign merge` from its flags to its files."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jalign import cli, models
from jalign.merge import MergeConfig, run_merge
from jalign.models import averaging, lora
from jalign.models.lora import LoraConfig
from jalign.pretrained import load_pretrained
from tests.data.conftest import CHATML, make_tokenizer
from tests.models import tiny
from tests.models.adapters import random_adapters

CONFIG = LoraConfig(rank=2, targets=("q_proj",))
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, one/, two/: models; adapter/ and reward/ on base, the latter with a
    tokenizer of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    sizes = tiny.SIZES | {"vocab_size": len(tokenizer), "hidden_size": 8}
    config = models.ModelConfig(**sizes, tie_embeddings=True, bos_token_id=1)
    model = models.Model(config)
    for seed, name in enumerate(("base", "one", "two")):
        models.save(folder / name, model, tiny.random_params(model, seed), tokenizer)
    for name, adapted in {"adapter": model, "reward": model.with_scalar_head()}.items():
        adapters = random_adapters(adapted, CONFIG)
        own = make_tokenizer(chat_template=CHATML) if name == "reward" else None
        how = dict(base="../base", tokenizer=own)
        models.save_adapter(folder / name, adapted, adapters, CONFIG, **how)
    return folder


@pytest.fixture
def merge(folder, monkeypatch, capsys):
    """Runs the command in the folder: (exit code, what it printed)."""
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)
    monkeypatch.chdir(folder)

    def run(words):
        code = cli.main(["merge", *words.split()])
        text, error = capsys.readouterr()
        return code, error or text

    return run


def test_an_adapter_becomes_a_model_with_its_tokenizer(folder, merge):
    code, text = merge("--model base --adapter adapter --out merged")
    assert code == 0, text
    assert "merged" in text and "tensors" in text
    adapted, merged = load_pretrained("adapter"), load_pretrained("merged")
    assert merged.model == adapted.model
    want = lora.merge(adapted.params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
        merged.params,
        want,
    )
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        assert (folder / "merged" / name).is_file()
    assert merged.tokenizer.get_vocab() == adapted.tokenizer.get_vocab()


def test_a_reward_adapter_becomes_a_reward_model(folder, merge):
    assert merge("--adapter reward --out judge --dtype bfloat16")[0] == 0
    adapted, judge = load_pretrained("reward"), load_pretrained("judge", head="scalar")
    assert judge.tokenizer.chat_template == CHATML
    got, want = judge.params["score"]["kernel"], adapted.params["score"]["kernel"]
    np.testing.assert_array_equal(got, want.astype("bfloat16").astype("f4"))
    config = json.loads((folder / "judge/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["pad_token_id"] == judge.tokenizer.pad_token_id


def test_every_method_makes_what_its_function_does(folder, merge):
    tensors = {
        name: load_file(folder / name / "model.safetensors")[EMBED]
        for name in ("base", "one", "two")
    }
    two, base = [tensors["one"], tensors["two"]], tensors["base"]
    cases = {
        "linear --weights 3 1": averaging.linear(two, weights=(3, 1)),
        "slerp --t 0.25": averaging.slerp(two, t=0.25),
        "task_arithmetic --base base --scale 0.5": averaging.task_arithmetic(
            two, base, scale=0.5
        ),
        "ties --base base --weights 1 2": averaging.ties(two, base, weights=(1, 2)),
    }
    for number, (words, want) in enumerate(cases.items()):
        code, text = merge(f"--models one two --out m{number} --method {words}")
        assert code == 0, text
        got = load_file(folder / f"m{number}/model.safetensors")[EMBED]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=words)
    drawn = []
    for words in ("", " --seed 0", " --seed 1"):
        run = "--models one two --out m --base base --density 0.5 --method dare_linear"
        assert merge(run + words)[0] == 0
        drawn.append(load_file(folder / "m/model.safetensors"))
    assert all((drawn[0][name] == drawn[1][name]).all() for name in drawn[0])
    change = drawn[0][EMBED] - base
    assert (change != drawn[2][EMBED] - base).any()
    left = [(x != 0).mean() for x in (change, drawn[2][EMBED] - base)]
    np.testing.assert_allclose(left, 0.75, atol=0.12)  # 1 - 0.5**2
    # Layers draw apart, though their tensors are of one shape.
    gone = [
        drawn[0][name.format(i)] == load_file(folder / "base/model.safetensors")[
            name.format(i)
        ]
        for name in ("model.layers.{}.mlp.up_proj.weight",)
        for i in (0, 1)
    ]  # fmt: skip
    assert (gone[0] != gone[1]).any()


def test_a_delta_is_made_and_applied(folder, merge):
    code, text = merge("--models one --base base --method delta --out delta")
    assert code == 0, text
    made = text.split()[-1]
    code, text = merge("--model base --delta delta --out again")
    assert (code, text.split()[-1]) == (0, made) and len(made) == 64
    for name in ("one", "again"):
        kept = load_file(folder / name / "model.safetensors")
        if name == "one":
            want = kept
    assert want.keys() == kept.keys()
    assert all(x.tobytes() == kept[name].tobytes() for name, x in want.items())
    code, text = merge("--model two --delta delta --out third")
    assert code == 2 and "another base than the delta" in text
    code, text = merge("--model base --delta one --out third")
    assert code == 2 and "delta.safetensors" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give one of --adapter, --delta, --models; got none"),
        ("--model a --adapter b --delta c", "got --adapter, --delta"),
        ("--delta c", "--delta needs --model, its base"),
        ("--model a --models b --method linear", "--models or --model, not both"),
        ("--models a b", "--models needs a --method"),
        ("--model a --adapter b --method linear", "--method is of --models"),
        ("--model a --adapter b --t 0.5", "--t says nothing with --adapter"),
        ("--model a --delta b --dtype float16", "--dtype says nothing with --delta"),
        (
            "--models a b --method linear --density 1",
            "--density says nothing with --met",
        ),
        (
            "--models a b --method linear --base c",
            "--base says nothing with --method l",
        ),
        ("--models a b --method ties --seed 0", "--seed says nothing with --method"),
        ("--models a b --method ties", "--method ties needs --base"),
        ("--models a b c --method slerp", "slerp takes 2 of --models, got 3"),
        ("--models a b --method delta --base c", "delta takes 1 of --models, got 2"),
        ("--models a b --method linear --weights 1", "1 --weights for 2 --models"),
        ("--models a b --method slerp --t 1.5", "t must be in [0, 1], got 1.5"),
        (
            "--models a b --method ties --base c --density 0",
            "density must be in (0, 1]",
        ),
        ("--models a b --method dare --base c", "dare"),
        ("--models gone b --method linear", "gone"),
        ("--model base --adapter one", "is a whole model, no adapter"),
        ("--models one adapter --method linear", "--adapter adapter --out DIR"),
        ("--models one two --method linear --weights 1 -1", "is not positive"),
        ("--models a b --method linear --weights 1 nan", "must be finite"),
    ],
)
def test_bad_input_is_one_message_and_exit_2(words, message, merge):
    code, text = merge(f"--out nowhere {words}")
    flat = " ".join(text.replace("│", " ").split())
    assert code == 2 and message in flat and "Traceback" not in text
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--models one two --method linear --out two",
        "--models one two --method ties --base base --out ./one/../base",
        "--model base --adapter adapter --out adapter",
        "--model base --adapter adapter --out link",
    ],
)
def test_an_input_is_no_output(words, folder, merge):
    if not (folder / "link").exists():
        (folder / "link").symlink_to("base")
    code, text = merge(words)
    assert code == 2 and "is one of the inputs; give a new folder" in text
    assert (folder / "base/config.json").exists()


def test_another_vocabulary_is_refused_by_its_first_token(folder, tmp_path):
    shutil.copytree(folder / "two", tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    words = list(vocab)
    vocab[words[5]], vocab[words[6]] = vocab[words[6]], vocab[words[5]]
    file.write_text(json.dumps(told))
    inputs = str(folder / "one"), str(tmp_path / "other")
    config = MergeConfig(out=str(tmp_path / "o"), models=inputs, method="linear")
    with pytest.raises(ValueError, match="different vocabularies.*another token"):
        run_merge(config)
    assert not (tmp_path / "o").exists()
