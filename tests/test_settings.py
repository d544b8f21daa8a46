"""Tests for jalign/settings.py: the flags' names as settings in Python."""

import dataclasses
import importlib

import pytest

from jalign import cli, settings, train
from jalign.train.online_config import PPOConfig

GIVEN = {"model": "m", "data": [{"prompt": "a"}] * 3, "out": "o"}


def test_flat_settings_are_the_nested_config():
    made = settings.settings_or(
        train.DPOConfig, None, GIVEN | {"beta": 0.2, "learning_rate": 1e-3, "steps": 2}
    )
    assert made == train.DPOConfig(
        **GIVEN,
        steps=2,
        dpo=train.DPOOptions(beta=0.2),
        optim=train.OptimConfig(learning_rate=1e-3),
    )
    flat = GIVEN | {"reward": len, "kl_coef": 0.0, "stop_token_ids": [3]}
    ppo = settings.settings_or(PPOConfig, None, flat | {"temperature": 0.5})
    assert ppo.ppo.kl.kl_coef == 0.0 and ppo.ppo.sampling.temperature == 0.5
    assert ppo.ppo.sampling.stop_token_ids == (3,)  # hashed, so a tuple
    assert settings.settings_or(PPOConfig, ppo, {}) is ppo


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_every_flag_of_a_command_is_a_setting(command):
    """And a group's default is its class's, which settings_or builds upon."""
    module, name, *_ = cli.COMMANDS[command]
    config_class = getattr(importlib.import_module(module), name)

    def defaults(kind):
        for field in dataclasses.fields(kind):
            if field.default_factory is not dataclasses.MISSING:
                made = field.default_factory()
                assert made == type(made)()
                yield from defaults(type(made))
            elif field.default is not dataclasses.MISSING:
                yield field.name, field.default

    flat = GIVEN | {"reward": "gsm8k"} if command in ("ppo", "grpo") else GIVEN
    every = dict(defaults(config_class)) | flat
    assert every.keys() == settings.flags_of(config_class).keys()
    made = settings.settings_or(config_class, None, every)
    assert made == config_class(**flat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"learning_rat": 1.0},
            "unknown setting 'learning_rat'; did you mean 'learning_rate'",
        ),
        ({"optim": train.OptimConfig()}, "unknown setting 'optim'"),
        ({"beta": -1.0}, "beta must be > 0"),
        ({"out": "nix://bucket/run"}, "nix://bucket/run: nix:// is not one of .*gs, "),
    ],
)
def test_what_is_no_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        train.run_dpo(**(GIVEN | changes))


def test_both_other_or_too_little_is_refused():
    config = train.DPOConfig(**GIVEN)
    with pytest.raises(ValueError, match="a DPOConfig and settings beside it .steps"):
        train.run_dpo(config, steps=2)
    with pytest.raises(ValueError, match="expected a SFTConfig, got DPOConfig"):
        train.run_sft(config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="PPOConfig needs data, out, reward as well"):
        train.run_ppo(model="m")
    with pytest.raises(ValueError, match="GRPOConfig needs model, data, out, reward"):
        train.run_grpo()
    with pytest.raises(ValueError, match="RewardConfig needs out as well"):
        train.run_reward(model="m", data="d")


def test_rows_and_functions_are_said_in_words():
    import datasets

    table = datasets.Dataset.from_list(GIVEN["data"])
    given = GIVEN | {"data": datasets.DatasetDict(train=table), "eval_data": table}
    text = settings.as_text(PPOConfig(**given, reward=[len, (0.5, "gsm8k")]))
    assert text["data"] == "train: 3 rows in memory"
    assert text["eval_data"] == "3 rows in memory"
    assert text["reward"] == ("len (in Python)", (0.5, "gsm8k"))
    assert text["ppo"]["kl"]["kl_coef"] == 0.05 and text["steps"] is None
    assert (
        settings.as_text(PPOConfig(**GIVEN, reward="r"))["data"] == "3 rows in memory"
    )


def test_the_command_takes_text_where_python_takes_rows(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(train, "run_grpo", seen.append)
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)
    flags = ["--model", "m", "--data", "d[train]", "--out", "o", "--reward", "gsm8k"]
    assert cli.main(["grpo", *flags, "--eval-data", "e"]) == 0
    assert cli.main(["grpo", *flags]) == 0
    assert [c.data for c in seen] == ["d[train]"] * 2
    assert [c.eval_data for c in seen] == ["e", None] and seen[0].reward == "gsm8k"
    assert cli.main(["grpo", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--data STR" in text and "--reward STR" in text and "CALLABLE" not in text
