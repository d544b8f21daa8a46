"""Adapters as models: found with their base, and through the commands."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jalign import cli, models, rewards
from jalign.models import lora
from jalign.models.lora import LoraConfig
from jalign.pretrained import load_pretrained, open_pretrained
from tests.data.conftest import CHATML, make_tokenizer
from tests.models import tiny
from tests.models.adapters import random_adapters

CONFIG = LoraConfig(rank=2, targets=("q_proj", "up_proj"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, with its tokenizer; adapter/ and reward/ on it; merged/, the first two."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    config = models.ModelConfig(**tiny.SIZES | {"vocab_size": len(tokenizer)})
    config = dataclasses.replace(config, eos_token_ids=(2,), bos_token_id=1)
    model = models.Model(config)
    params = model.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x if x.min() == 1 else 10 * x, params)  # but norms
    adapters = random_adapters(model, CONFIG)
    models.save(folder / "base", model, params, tokenizer)
    models.save_adapter(folder / "adapter", model, adapters, CONFIG, base="base")
    whole = lora.merge(lora.join(params, adapters))
    models.save(folder / "merged", model, whole, tokenizer)
    scalar = model.with_scalar_head()
    scored = random_adapters(scalar, CONFIG)
    models.save_adapter(folder / "reward", scalar, scored, CONFIG, base="../base")
    return folder


def names(folder, base, at):
    """A copy of the adapter that names another base."""
    at.mkdir()
    for file in folder.iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    file = at / "adapter_config.json"
    said = json.loads(file.read_text()) | {"base_model_name_or_path": base}
    file.write_text(json.dumps(said))
    return at


def test_an_adapter_is_the_merged_model(folder, monkeypatch):
    monkeypatch.chdir(folder)
    tokens = tiny.random_tokens()
    loaded = load_pretrained("adapter", head="language")
    merged = load_pretrained("merged")
    assert loaded.model == merged.model
    want = merged.model.logits(merged.params, tokens)
    got = loaded.model.logits(loaded.params, tokens)
    np.testing.assert_allclose(got, want, atol=1e-5)
    opened = open_pretrained("adapter")
    assert (str(opened.adapter), str(opened.folder)) == ("adapter", "base")
    assert (opened.base, opened.lora) == ("base", CONFIG)
    assert not open_pretrained("merged").adapter


def test_the_base_is_the_one_from_here_from_there_or_the_one_given(
    folder, tmp_path, monkeypatch
):
    beside = names(folder / "adapter", "../base", tmp_path / "beside")
    whole = names(folder / "adapter", str(folder / "base"), tmp_path / "whole")
    assert open_pretrained(whole).folder == folder / "base"
    (tmp_path / "base").symlink_to(folder / "merged")
    assert open_pretrained(beside).folder == beside / "../base"
    (tmp_path / "cwd" / "x").mkdir(parents=True)
    (tmp_path / "cwd" / "base").symlink_to(folder / "base")
    monkeypatch.chdir(tmp_path / "cwd" / "x")  # where ../base is another one
    assert str(open_pretrained(beside).folder) == "../base"
    given = open_pretrained(beside, folder / "merged")
    assert given.folder == folder / "merged" and given.base == str(folder / "merged")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("gone/for/good", "its base model is not there; give that with --base"),
        ("owner/gone", "its base model is not there; give that with --base"),
        (None, "has no base_model_name_or_path: give the base with --base"),
        ("{folder}/reward", "is an adapter too"),
    ],
)
def test_a_base_that_is_none_is_named(base, message, folder, tmp_path):
    base = base and base.format(folder=folder)
    adapter = names(folder / "adapter", base, tmp_path / "adapter")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_pretrained(adapter)
    assert str(adapter) in str(error.value)


def test_a_base_is_of_adapters_only(folder):
    with pytest.raises(ValueError, match="merged is a whole model, no adapter"):
        open_pretrained(folder / "merged", folder / "base")


def test_the_tokenizer_beside_an_adapter_goes_before_its_bases(folder, tmp_path):
    adapter = names(folder / "adapter", str(folder / "base"), tmp_path / "a")
    (adapter / "config.json").write_bytes((folder / "base/config.json").read_bytes())
    assert not open_pretrained(adapter).tokenizer.chat_template
    make_tokenizer(chat_template=CHATML).save_pretrained(adapter)
    assert open_pretrained(adapter).tokenizer.chat_template == CHATML


def test_a_reward_adapter_is_a_reward_model_on_a_language_model(folder):
    model, params, tokenizer = load_pretrained(folder / "reward", head="scalar")
    assert model.config.num_labels == 1 and "unembed" not in params
    base, base_params = models.load(folder / "base")
    adapters, _ = models.load_adapter(folder / "reward", base.with_scalar_head())
    np.testing.assert_array_equal(
        params["score"]["kernel"], adapters["score"]["kernel"]
    )
    judge = rewards.load_reward(str(folder / "reward"))
    got = judge(["Hi", "Hi"], [" there", " you"], [{}, {}])
    tokens = [tokenizer(text + "</s>").input_ids for text in ("Hi there", "Hi you")]
    joined = lora.join(base_params, adapters)
    for row, ids in enumerate(tokens):
        hidden, _ = model.apply(joined, np.array([ids], np.int32))
        want = float(model.score(joined, hidden)[0, -1])
        assert got[row] == pytest.approx(want, abs=1e-4)
    with pytest.raises(ValueError, match="reward is a reward model"):
        open_pretrained(folder / "reward", head="language")
    with pytest.raises(ValueError, match="adapter is no reward model"):
        open_pretrained(folder / "adapter", folder / "base", head="scalar")


def test_generate_and_eval_take_an_adapter_by_the_command(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "completion": " there"}) + "\n")
    generate = ("generate", "--prompt=Hi", "--max-new-tokens=8", "--temperature=0")
    measure = ("eval", "--data", str(rows), "--max-length", "16")

    def run(command, *model):
        code = cli.main([*command, "--mesh", "fsdp=1", "--model", *map(str, model)])
        text, error = capsys.readouterr()
        return code, text or error

    adapter, base = folder / "adapter", folder / "base"
    for command in (generate, measure):
        code, text = run(command, adapter, "--base", base)
        merged = run(command, folder / "merged")
        assert (code, merged[0]) == (0, 0), text
        if command is generate:
            assert text == merged[1] != run(command, base)[1]
        else:
            loss = json.loads(text)["loss"]
            assert loss == pytest.approx(json.loads(merged[1])["loss"], abs=1e-5)
        code, text = run(command, names(adapter, "./gone", tmp_path / command[0]))
        assert code == 2 and "--base" in text and "Traceback" not in text
