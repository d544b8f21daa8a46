"""The plan as a person reads it, and where its model may come from."""

import json

import pytest

from jalign import cli, plan, train
from jalign.models.hf_config import config_to_hf

from .test_estimate import LARGE, ON_16, TINY


def test_table_shows_every_row_and_the_verdict():
    result = plan.plan("dpo", LARGE, **ON_16)
    text = str(result)
    for row in result.resident + result.transient["update"]:
        assert f"{row.name:<26}{row.bytes / 2**30:9.3f}" in text
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
    assert "jalign plan sft --model MODEL" in capsys.readouterr().err
    assert cli.main(["plan", "--help"]) == 0 and cli.main(["plan"]) == cli.EXIT_USER
