"""Tests for jalign/demo/recipe.py, and for the files embedded in jalign/demo/assets."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jalign import data, models
from jalign.demo import ASSETS, DemoConfig, recipe, task
from tests.demo.few import write_few
from tests.demo.scripts import ROOT, load_maker

ROW = {"model": "DPO", "preferred": 0.953, "KL to SFT": 1.234, "seconds": 12.3}


def rows_of(name):
    lines = (ASSETS / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_assets_are_small_and_load():
    size = sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file())
    assert size <= 4 * 2**20
    model, params = models.load(str(ASSETS / "model"))
    assert sum(x.size for x in jax.tree.leaves(params)) <= 2_000_000
    tokenizer = data.load_tokenizer(ASSETS / "model")
    data.check_vocab(tokenizer, model.config.vocab_size)
    assert tokenizer.eos_token_id in model.config.eos_token_ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_script_writes_the_data_that_is_embedded(tmp_path):
    load_maker().write_data(tmp_path)
    written = sorted(tmp_path.iterdir())
    assert [f.name for f in written] == sorted(f.name for f in ASSETS.glob("*.jsonl"))
    for file in written:
        assert file.read_bytes() == (ASSETS / file.name).read_bytes(), file.name


def test_held_out_rows_are_held_out():
    for name in ("prompts", "preferences", "sft"):
        train, held_out = (
            {row["prompt"] for row in rows_of(f"{name}_{part}")}
            for part in ("train", "heldout")
        )
        asked = [
            {(a["name"], a["thing"]) for a in (task.parse(p, "prompt") for p in side)}
            for side in (train, held_out)
        ]
        assert not asked[0] & asked[1], name


def test_the_rows_fit_the_lengths_of_the_recipe():
    tokenizer = data.load_tokenizer(ASSETS / "model")
    for row in rows_of("preferences_train"):
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        for reply in (row["chosen"], row["rejected"]):
            assert prompt <= recipe.PROMPT_LENGTH
            assert len(tokenizer(reply)["input_ids"]) < recipe.REPLY_LENGTH


def test_the_table_is_aligned():
    rows = [ROW, ROW | {"model": "base", "preferred": 1.0, "KL to SFT": None}]
    header, rule, first, second = task.format_table(rows).splitlines()
    assert len({len(line) for line in (header, rule, first, second)}) == 1
    assert header.split("  ")[0] == "model"
    assert first.split() == ["DPO", "95.3%", "1.23", "12"]
    assert second.split() == ["base", "100.0%", "–", "12"]


def test_a_model_that_got_worse_is_marked():
    rows = [ROW | {"model": name, "preferred": share} for name, share in
            (("base", 0.1), ("SFT", 0.5), ("PPO", 0.4), ("DPO", 0.9))]  # fmt: skip
    assert task.worse(rows) == ["PPO"]
    lines = task.format_table(rows).splitlines()
    assert [line for line in lines if "(worse)" in line] == [lines[4]]
    assert len(set(map(len, lines))) == 1


def test_wrong_settings_are_errors():
    with pytest.raises(ValueError, match="ppo_steps must be >= 1, got 0"):
        DemoConfig(ppo_steps=0)


# The command, with the assets that its first word names.
DEMO = (
    "import pathlib, sys; from jalign import cli; from jalign.demo import recipe;"
    "recipe.ASSETS = pathlib.Path(sys.argv.pop(1)); sys.exit(cli.main())"
)


@pytest.mark.slow
def test_the_demo_runs_through(tmp_path):
    """The command on one device, a few steps a stage: files, table and figures."""
    out, assets = tmp_path / "demo", write_few(tmp_path / "assets")
    flags = [f"--{stage}-steps=2" for stage in ("sft", "reward", "ppo", "dpo")]
    run = subprocess.run(
        [sys.executable, "-c", DEMO, assets, "demo", f"--out={out}", *flags]
        + ["--eval-prompts=8"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads((out / "table.json").read_text("utf-8"))
    assert task.format_table(rows) in run.stdout
    assert [row["model"] for row in rows] == list(recipe.FOLDERS)
    by_name = {row["model"]: row for row in rows}
    assert abs(by_name["SFT"]["KL to SFT"]) < 1e-4
    for name in ("reward model", "DPO"):
        assert 0 <= by_name[name]["reward accuracy"] <= 1
    for row in rows:
        assert row["preferred"] is None or 0 <= row["preferred"] <= row["happy"] <= 1
    html = (out / "report.html").read_text("utf-8")
    assert "Tell a story about" in html and "objective/kl" in html
