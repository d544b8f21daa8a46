"""Tests for jalign/commands.py: `generate` and `eval` on the embedded model."""

import json

import pytest

from jalign import cli, data, models
from jalign.commands import EvalConfig, GenerateConfig, run_eval, run_generate
from jalign.demo import ASSETS

MODEL = str(ASSETS / "model")
MESH = "data=1,fsdp=1,tensor=1"


def test_generate_prints_prompt_and_continuation_and_is_reproducible():
    config = GenerateConfig(
        model=MODEL, prompt=("Tell a story",), max_new_tokens=8, mesh=MESH, seed=3
    )
    text = run_generate(config)
    assert text and text.startswith("Tell a story") and len(text) > 20
    assert run_generate(config) == text


def test_generate_writes_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Tell a"}\n{"prompt": "Tell"}\n', encoding="utf-8")
    how = dict(max_new_tokens=4, temperature=0.0, mesh=MESH)
    assert (
        run_generate(
            GenerateConfig(model=MODEL, prompts=str(prompts), out=str(out), **how)
        )
        is None
    )
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["Tell a", "Tell"]
    assert all(row["completion"] for row in rows)


def test_conflicts_are_errors():
    with pytest.raises(ValueError, match="--prompt"):
        GenerateConfig(model=MODEL)
    with pytest.raises(ValueError, match="--reward"):
        EvalConfig(model=MODEL, data="x", task="reward")


def words(completions):
    return [float(len(text.split())) for text in completions]


def test_eval_of_completions_pairs_and_rewards(tmp_path):
    how = dict(model=MODEL, limit=8, mesh=MESH, max_length=64, max_new_tokens=8)
    rows = str(ASSETS / "sft_heldout.jsonl")
    sft = json.loads(run_eval(EvalConfig(data=rows, **how)))
    assert sft["loss"] > 0 and sft["rows"]["examples"] == 8
    rows = str(ASSETS / "preferences_heldout.jsonl")
    # Against itself the implicit reward of both is 0: every pair is a tie.
    pairs = json.loads(run_eval(EvalConfig(data=rows, ref_model=MODEL, **how)))
    assert pairs["num_pairs"] == 8
    assert pairs["margin"] == pytest.approx(0, abs=1e-3)
    reward = tmp_path / "length.py"
    reward.write_text(
        "def words(prompts, completions, rows):\n"
        "    return [float(len(c.split())) for c in completions]\n"
        "def longer(completions, prompts, **kwargs):\n"
        "    return [1 + len(text.split()) for text in completions]\n",
        encoding="utf-8",
    )
    out = tmp_path / "result.json"
    rows = str(ASSETS / "prompts_heldout.jsonl")
    config = EvalConfig(data=rows, reward=f"{reward}:words", out=str(out), **how)
    result = json.loads(run_eval(config))
    assert 0 < result["reward_mean"] <= 8
    # In Python rows and a function do as well, and this one is of TRL's form.
    given = data.load_rows(rows, limit=8)
    counted = EvalConfig(
        data=given, reward=lambda completions: words(completions), **how
    )
    assert json.loads(run_eval(counted))["reward_mean"] == result["reward_mean"]
    # The worst case of two, one of them written for TRL, by the command itself.
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in how.items()]
    worst = f"0.5*min({reward}:words, {reward}:longer) + gsm8k_format"
    both = out.with_name("both.json")
    code = cli.main(
        ["eval", "--data", rows, "--reward", worst, f"--out={both}", *flags]
    )
    half = json.loads(both.read_text("utf-8"))
    assert code == 0 and half["reward_mean"] == pytest.approx(result["reward_mean"] / 2)
    assert json.loads(out.read_text("utf-8")) == result
    assert len(data.load_rows(rows, limit=8)) == 8


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("model", "./nowhere", "nowhere"),
        ("data", "nowhere.jsonl", "nowhere.jsonl"),
        ("ref_model", "./nowhere", "nowhere"),
        ("reward", "nowhere.py:f", "nowhere.py"),
        ("reward", MODEL, "no reward model"),
        ("task", "preference", "expected chosen"),
    ],
)
def test_eval_says_what_is_wrong_before_a_model_is_loaded(
    field, value, match, monkeypatch
):
    monkeypatch.setattr(models, "load", None)
    good = {"model": MODEL, "data": str(ASSETS / "sft_heldout.jsonl"), "mesh": MESH}
    with pytest.raises((ValueError, OSError), match=match):
        run_eval(EvalConfig(**(good | {field: value})))
