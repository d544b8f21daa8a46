"""The plan as a person reads it, and where its model may come from."""

import json

import pytest

from jalign import cli, models, plan, train
from jalign.models import Model
from jalign.models.hf_config import config_to_hf
from jalign.models.lora import LoraConfig
from tests.models.adapters import random_adapters

from .test_estimate import LARGE, ON_16, TINY


def test_table_shows_every_row_and_the_verdict():
    result = plan.plan("dpo", LARGE, **ON_16)
    text = str(result)
    for row in result.resident + result.transient["update"]:
        assert f"{row.name:<28}{row.bytes / 2**30:9.3f}" in text
    assert "16 x v5e" in text and "8.03 B parameters" in text
    assert text.endswith("fits in 16 GiB (92% usable)")


def test_table_says_what_would_fit():
    result = plan.plan("sft", LARGE, topology="v5e:1x1", batch_size=1)
    assert "does NOT fit" in str(result) and "it would fit on" in str(result)


def test_capacity_of_a_cpu_is_unknown():
    assert plan.plan("sft", TINY).fits is None
    assert "capacity unknown" in str(plan.plan("sft", TINY))


def test_model_from_a_folder_a_file_a_dict_and_a_config(tmp_path):
    raw, _ = config_to_hf(TINY)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    totals = {plan.plan("sft", m).total for m in (str(tmp_path), str(file), raw, TINY)}
    assert len(totals) == 1
    text = plan.run_plan(plan.SFTPlan(model=str(tmp_path)))
    assert "peak (estimate)" in text


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """adapter/ and reward/, of rank 2 on q and up, on base/, a config alone."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps(config_to_hf(TINY)[0]))
    model, config = Model(TINY), LoraConfig(2, targets=("q_proj", "up_proj"))
    for name, each in {"adapter": model, "reward": model.with_scalar_head()}.items():
        made = random_adapters(each, config)
        models.save_adapter(folder / name, each, made, config, base="../base")
    return folder


@pytest.mark.parametrize("recipe", ["sft", "ppo", "reward"])
def test_a_plan_reads_an_adapter_and_its_base_as_the_run_does(recipe, adapters):
    """What goes on with adapters takes as much as what begins with such."""
    flags = {"lora_rank": 2, "lora_targets": "q_proj,up_proj"}
    new = plan.plan(recipe, TINY, **flags)
    folder = adapters / ("reward" if recipe == "reward" else "adapter")
    found = plan.plan(recipe, str(folder))
    assert found.num_parameters == new.num_parameters
    assert found.resident == new.resident and found.transient == new.transient
    assert plan.plan(recipe, TINY).total > found.total
    given = plan.plan(recipe, str(folder), base=str(adapters / "base"))
    assert given.total == found.total


def test_what_a_run_refuses_of_adapters_a_plan_refuses(adapters, tmp_path):
    adapter, base = (str(adapters / name) for name in ("adapter", "base"))
    with pytest.raises(ValueError, match="has adapters already"):
        plan.plan("sft", adapter, lora_rank=4)
    with pytest.raises(ValueError, match="no adapter: leave out --base"):
        plan.plan("sft", base, base=base)
    lost = tmp_path / "adapter_config.json"
    said = json.loads((adapters / "adapter" / lost.name).read_text())
    lost.write_text(json.dumps(said | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="give the base with --base"):
        plan.plan("sft", str(tmp_path))


def test_a_bad_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"config\.json.*t5"):
        plan.plan("sft", str(tmp_path))


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_the_plan_of_a_run_is_that_of_its_config(recipe):
    """With the run's own defaults, whether it comes as a config or as settings."""
    given = {"model": "m", "data": "d", "out": "o"}
    if recipe in ("ppo", "grpo"):
        given |= {"reward": "gsm8k"}
    config_class = getattr(train, f"{recipe.upper()}Config", train.RewardConfig)
    config = config_class(**given)
    of_config = plan.plan(config, TINY)
    of_settings = plan.plan(recipe, TINY)
    assert of_config.config is config
    assert of_config.resident == of_settings.resident
    assert of_config.transient == of_settings.transient
    assert isinstance(of_settings.config, config_class)
    assert of_settings.config.max_length == config.max_length
    with pytest.raises(ValueError, match="settings beside it .seed"):
        plan.plan(config, TINY, seed=1)


def test_what_is_no_recipe_or_no_model_is_named():
    with pytest.raises(ValueError, match="'stf' is not one of sft, .* mean 'sft'"):
        plan.plan("stf", TINY)
    with pytest.raises(ValueError, match="DPOPlan needs model as well"):
        plan.plan("dpo")


def test_the_command_takes_the_words_of_the_run(tmp_path, monkeypatch, capsys):
    raw, _ = config_to_hf(TINY)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)
    words = ["--model", str(tmp_path), "--beta", "0.2", "--microbatches", "2"]
    words += ["--batch-size", "16"]
    assert cli.main(["plan", "dpo", *words]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("dpo of ") and "in 2 micro-batch(es), float32" in alone
    assert cli.main(["plan", "dpo", *words, "--data", "d", "--out", "o"]) == 0
    assert capsys.readouterr().out == alone
    assert cli.main(["plan", "--recipe", "sft"]) == cli.EXIT_USER
    assert "of which --model alone" in capsys.readouterr().err
    assert cli.main(["plan", "--help"]) == 0 and cli.main(["plan"]) == cli.EXIT_USER
