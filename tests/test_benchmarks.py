"""The parts of benchmarks/ that compute; the workers are run by `make bench`."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import assets, cold, compare, floor, measure, settings, table, text
from benchmarks.settings import MODELS, ROOT, Shape


def run_of(seconds, losses=(), tokens=80, rss=100.0):
    return {
        "seconds": [9.0, *seconds],
        "cpu": [18.0, *(2 * x for x in seconds)],
        "warm": 1,
        "tokens": tokens,
        "examples": 4,
        "losses": list(losses),
        "rss_peak": rss,
        "rss_imported": 10.0,
    }


def test_forward_flops_are_those_of_the_matrix_products_written_out():
    shape = Shape(11, 8, 12, 3, 4, 2)
    tokens, predicted, width = 5, 4, shape.head_dim
    layer = 0
    for columns in (4 * width, 2 * width, 2 * width):  # q, k, v
        layer += 2 * tokens * 8 * columns
    layer += 2 * tokens * (4 * width) * 8  # o
    layer += 3 * 2 * tokens * 8 * 12  # gate, up, down
    for query in range(tokens):
        layer += 4 * 2 * 2 * width * (query + 1)  # scores and values, 4 heads
    assert floor.forward_flops(shape, tokens, predicted) == (
        3 * layer + 2 * predicted * 8 * 11
    )


def test_a_dpo_step_is_four_forward_passes_of_both_sides():
    shape = MODELS["7m"]
    pair = {"prompt_ids": [1] * 4, "chosen_ids": [1] * 3, "rejected_ids": [1] * 2}
    rows = {"pairs": [pair] * 2}
    both = floor.forward_flops(shape, 7, 3) + floor.forward_flops(shape, 6, 2)
    assert floor.step_flops("dpo", shape, rows) == 4 * settings.ROWS * both
    assert floor.step_flops("sample", shape, rows) is None


def test_models_are_of_the_sizes_they_are_named_after():
    for name, millions in (("7m", 6.5), ("40m", 40.0)):
        shape = MODELS[name]
        count = floor.layer_weights(shape) + shape.vocab_size * shape.hidden_size
        assert count / 1e6 == pytest.approx(millions, rel=0.02)


def test_ratio_is_the_median_over_neighbouring_runs():
    ours = [run_of([1.0]), run_of([4.0]), run_of([1.0])]  # a slow minute
    peer = [run_of([2.0]), run_of([8.0]), run_of([3.0])]
    assert compare.ratio(peer, ours) == 2.0


def test_rows_hold_ratios_floor_and_the_loss_gap():
    results = {
        "7m/sft": {
            "jalign": [run_of([1.0, 1.0], [9.0, 8.0])],
            "trl": [run_of([2.0, 2.0], [9.0, 8.1])],
            "tunix": "not measured: it is missing",
        }
    }
    ours, trl, tunix = compare.rows_of(results, {"7m/sft": 0.5})
    assert ours["floor"] == 0.5 and "ratio" not in ours
    assert ours["tokens_per_s"] == 40.0 and ours["cpu_s"] == 2.0
    assert trl["cpu_ratio"] == trl["ratio"] == 2.0
    assert trl["loss_gap"] == pytest.approx(0.1 / 8.1)
    assert tunix["missing"].startswith("not measured")
    (warning,) = compare.disagreements([ours, trl, tunix])
    assert "7m/sft" in warning and "trl" in warning


def test_table_has_a_line_for_each_row():
    results = {"7m/early": {"jalign": [run_of([1.0])], "trl": "failed: see x.log"}}
    lines = table.markdown(compare.rows_of(results, {}), {"cores": 2}).splitlines()
    assert lines[0] == "cores 2" and len(lines) == 6
    assert {line.count("|") for line in lines[2:]} == {len(table.HEADER) + 1}
    assert "failed: see x.log" in lines[-1]


def test_cold_starts_are_compared_in_turn_and_have_columns_of_their_own():
    starts = {"7m/dpo": {"jalign": [10.0, 40.0, 10.0], "trl": [20.0, 80.0, 40.0]}}
    rows = compare.rows_of({}, {}, starts)
    assert rows[0] == {"work": "7m/dpo", "framework": "jalign", "cold_s": 10.0}
    assert rows[1]["cold_s"] == 40.0 and rows[1]["cold_ratio"] == 2.0
    lines = table.markdown(rows, {}).splitlines()
    assert lines[2].endswith("cold, s to step 20 | times jalign, cold |")
    assert lines[-1].endswith("| 40.0 | 2.00 |")
    assert {line.count("|") for line in lines[2:]} == {len(table.HEADER) + 1}
    warm = {"7m/dpo": {"jalign": [run_of([1.0])], "tunix": "failed"}}
    both = compare.rows_of(warm, {}, starts | {"7m/sft": {"jalign": "failed: log"}})
    assert [row["framework"] for row in both] == ["jalign", "tunix", "trl", "jalign"]
    assert both[0]["step_s"] == 1.0 and both[0]["cold_s"] == 10.0
    assert both[3]["cold_missing"] == "failed: log"


FAKE = """
import json, sys, time
path, steps = sys.argv[1:]
for step in range(1, int(steps) + 1):
    with open(path, "a") as file:
        print(json.dumps({"step": step, "loss": 1.0}), file=file)
    time.sleep(0.01)
time.sleep(0.3)
"""


@pytest.mark.parametrize(("steps", "found"), [(settings.COLD_STEPS, True), (3, False)])
def test_the_clock_stops_at_the_last_step_and_not_at_the_end(tmp_path, steps, found):
    file = tmp_path / "metrics.jsonl"
    words = [sys.executable, "-c", FAKE, str(file), str(steps)]
    start = time.perf_counter()
    with subprocess.Popen(words) as process:
        seconds = cold.wait_for_step(file, process, start, 30)
        assert (process.poll() is None) == found
    assert (seconds is not None) == found
    if found:
        cold.check_losses(file)
    else:
        with pytest.raises(ValueError, match="not the rows of 20 steps"):
            cold.check_losses(file)


def test_a_cold_run_finds_no_cache_and_jalign_takes_its_flags(tmp_path, monkeypatch):
    """The command is given to jalign's own parser; the process is told another."""
    from jalign import cli, cli_options, train

    out = tmp_path / "o"
    words = cold.command("python", "jalign", "dpo", "7m", out)
    assert words[1:4] == ["-m", "jalign", "dpo"]
    config, _ = cli_options.parse("dpo", words[4:], train.DPOConfig, cli.Launch)
    assert (config.steps, config.out) == (settings.COLD_STEPS, str(out))
    assert config.optim.learning_rate == settings.LEARNING_RATE["dpo"]
    shown = "import os; print(os.environ['XDG_CACHE_HOME'], 'HF_HOME' in os.environ)"
    monkeypatch.setattr(cold, "BUILD", tmp_path)
    monkeypatch.setattr(cold, "ROOT", tmp_path)
    monkeypatch.setattr(cold.assets, "folder", lambda model: tmp_path / model)
    monkeypatch.setattr(cold, "command", lambda *_: [sys.executable, "-c", shown])
    monkeypatch.setenv("HF_HOME", "/x")
    found = cold.run(sys.executable, "jalign", "dpo", "7m", 30)
    assert found == "failed: see 7m-dpo-jalign-cold.log"
    folder, known = (tmp_path / "7m-dpo-jalign-cold.log").read_text().split()
    assert known == "False" and not Path(folder).exists()


def test_laps_count_from_end_to_end():
    spans, values = measure.laps(iter([3, 4]))
    assert values == [3, 4] and len(spans.seconds) == len(spans.cpu) == 2
    assert measure.spans([(1.0, 0.0), (3.0, 1.0)]) == ([2.0], [1.0])


def test_completions_of_another_length_are_an_error():
    measure.check_lengths([[2, 3], [2, 3]], [2, 3])
    with pytest.raises(ValueError, match="are not"):
        measure.check_lengths([[2, 4]], [2, 3])


def test_early_lengths_have_the_mean_that_settings_say():
    lengths = np.array(assets.early_lengths())
    assert lengths.mean() == settings.EARLY_MEAN == settings.NEW_TOKENS / 4
    assert lengths.min() >= 1 and lengths.max() <= settings.NEW_TOKENS


def test_a_prompt_stands_its_length_before_the_end_of_the_chain():
    order = assets.chain(300, eos=1).tolist()
    for prompt, length in zip(
        assets.early_prompts(300, 1, [1, 7]), [1, 7], strict=True
    ):
        assert order[order.index(prompt[-1]) + length :] == [1]


def test_generated_pairs_are_deterministic_and_their_prompts_end_in_a_newline():
    pairs = text._generated(20)
    assert pairs == text._generated(20)
    assert all(pair["prompt"].endswith("\n") for pair in pairs)
    words = [len(pair["chosen"].split()) for pair in text._generated(100)]
    assert 60 < np.median(words) < 300


def test_an_unknown_piece_is_an_error_of_the_command():
    command = [sys.executable, "-m", "benchmarks", "--only", "stf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "'stf' is not one of" in done.stderr
