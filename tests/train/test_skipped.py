"""A run whose steps were skipped ends as one that has not learned; its advice helps."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jalign import models
from tests.train import world


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_a_rate_that_overflows_exports_nothing_and_the_advice_works(
    command, folder, tmp_path, capsys
):
    flags = ["--schedule", "constant"]
    if command == "grpo":
        flags += ["--reward", f"{folder / 'reward.py'}:words", "--group-size", "4"]
        flags += ["--max-new-tokens", "8"]
    for _ in range(2):  # the second has nothing left to do, and no better news
        code = world.run(command, folder, tmp_path, *flags, "--learning-rate", "inf")
        text = capsys.readouterr().err
        assert code == 2 and "2 of 2 steps were skipped" in text
        assert "steps 1 to 2; rows of step 1: " in text and "Traceback" not in text
        assert ("rows.jsonl row " if command == "sft" else "example ") in text
        assert not (tmp_path / "model").exists()
    code = world.run(command, folder, tmp_path, *flags, "--learning-rate", "1e-3")
    assert code == 2 and "--no-resume" in capsys.readouterr().err
    flags += ["--learning-rate", "1e-3", "--no-resume"]
    assert world.run(command, folder, tmp_path, *flags) == 0
    assert models.load(tmp_path / "model")
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["skipped"] for row in rows] == [0, 0]


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path):
    model, params = models.load(folder / "model")
    models.save(tmp_path, model, params)
    before = (tmp_path / "model.safetensors").read_bytes()
    params["embed"]["embedding"] = params["embed"]["embedding"].at[3, 4].set(np.nan)
    with pytest.raises(ValueError, match="embed/embedding is not finite"):
        models.save(tmp_path, model, params)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert (tmp_path / "config.json").is_file()


def test_logits_that_overflow_while_sampling_are_one_message(folder, tmp_path, capsys):
    files = {f.name: f.read_bytes() for f in (folder / "model").iterdir()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.startswith("lm_head"))
    tensors[name] = np.full_like(tensors[name], 3e38)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    words = ["generate", "--model", str(tmp_path), "--prompt", "a b", "--mesh"]
    words += ["fsdp=1", "--num-processes", "1", "--max-new-tokens", "8"]
    code = world.quietly(words)
    text = capsys.readouterr().err
    assert code == 2 and "NaN or infinite" in text and "Traceback" not in text
