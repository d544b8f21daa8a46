"""Tests for jalign/figures/: which curves are drawn, joined, left out, and how."""

import ast
import re
from pathlib import Path

import pytest

from jalign import figures
from jalign.figures import drawing, notes

STEPS = range(1, 41)
ROWS = [
    {
        "step": step,
        "loss": 1 / step,
        "nll": 1 / step * (1 + 1e-7),
        "grad_norm": float("nan"),
        "rewards/chosen": step,
        "rewards/rejected": -step,
        "beta": 0.1,
        "val/ratio_first": 1 + 1e-7 * (step % 2),
        "a<b": step**2,
    }
    for step in STEPS
] + [{"step": 40, "eval_loss": 0.5}]


def test_related_curves_share_a_figure_and_nan_is_left_out():
    found = {f.name: f for f in figures.figures_of(ROWS).drawn}
    assert set(found) == {"loss", "rewards", "a<b"}  # grad_norm is never finite
    assert set(found["loss"].curves) == {"train", "held-out"}
    assert set(found["rewards"].curves) == {"chosen", "rejected"}
    assert found["loss"].curves["held-out"] == ([40.0], [0.5])


def test_what_never_moves_or_repeats_is_named_and_not_drawn():
    found = figures.figures_of(ROWS)
    assert found.repeated == {"nll": "loss"}
    assert found.still == {"beta": 0.1, "val/ratio_first": 1.0}


def test_a_single_measurement_is_drawn():
    found = figures.figures_of([{"step": 1, "loss": 2.0, "nll": 2.0}])
    assert [f.name for f in found.drawn] == ["loss", "nll"] and not found.still


@pytest.mark.parametrize(
    ("training", "held_out", "joins"),
    [
        ("reward", "eval_reward", True),
        ("rewards/a/mean", "eval_rewards/a", True),
        ("rewards/accuracies", "eval_accuracy", True),
        ("objective/kl", "eval_kl", True),
        ("kl", "eval_kl", False),  # nats a token, nats a completion
        ("num_tokens", "eval_num_tokens", False),  # seen so far, measured on
    ],
)
def test_held_out_curves_join_what_measures_the_same(training, held_out, joins):
    rows = [{"step": s, training: s, held_out: s * s} for s in range(3)]
    found = {f.name: f for f in figures.figures_of(rows).drawn}
    assert set(found) == ({training} if joins else {training, held_out})


def test_a_held_out_loss_is_shown_with_the_likelihood_where_the_loss_is_another():
    rows = [{"step": s, "loss": s, "nll": s**2, "eval_loss": 3 * s} for s in range(3)]
    found = {f.name: f for f in figures.figures_of(rows).drawn}
    assert set(found["nll"].curves) == {"train", "held-out"}
    assert set(found["loss"].curves) == {"train"}


def online(step, **more):
    return {"step": step, "reward": step / 2} | more


@pytest.mark.parametrize(
    "columns", [{"objective/kl": 6.0}, {"kl": 0.5, "completions/mean_length": 12}]
)
def test_rewards_are_drawn_over_nats_a_completion_and_the_kept_step_is_ringed(columns):
    rows = [online(step, **columns) for step in (1, 2)]
    # Not in the order of the KL: a line goes on in the order of the steps.
    for step, kl, held_out in ((0, 0.0, 1.0), (1, 8.0, 3.0), (2, 7.0, 2.0)):
        rows.append(online(step, eval_kl=kl, eval_reward=held_out))
    rows[2].pop("reward")
    first = figures.figures_of(rows, kept_step=1).drawn[0]
    assert first.name == figures.OVER_KL
    assert first.curves["while training"] == ([6.0, 6.0], [0.5, 1.0])
    assert first.curves["held-out"] == ([0.0, 8.0, 7.0], [1.0, 3.0, 2.0])
    assert first.kept == ([8.0], [3.0]) and "kept: step 1" in first.svg
    assert "nats a completion" in first.svg


def test_without_a_kl_there_is_no_figure_over_it():
    rows = [online(step, eval_reward=1.0 * step) for step in range(3)]
    assert [f.name for f in figures.figures_of(rows).drawn] == ["reward"]


def test_the_kept_step_is_marked_where_something_was_held_out():
    found = figures.figures_of(ROWS, kept_step=20).drawn
    assert [f.name for f in found if "kept: 20" in f.svg] == ["loss"]


def test_figures_follow_the_theme_and_are_deterministic():
    first, again = (figures.figures_of(ROWS).drawn[0] for _ in range(2))
    assert first.svg == again.svg
    assert "var(--c1)" in first.svg and "var(--c2)" in first.svg
    assert not any(colour in first.svg for colour in drawing.CSS_VARIABLES)
    assert "font-family" not in first.svg


def test_every_metric_finds_a_group():
    names = ["loss/policy_avg", "learning_rate", "tokens_per_second", "whatever"]
    rows = [{"step": s} | {n: s + i for i, n in enumerate(names)} for s in range(3)]
    groups = {f.name: f.group for f in figures.figures_of(rows).drawn}
    assert list(groups.values()) == ["Loss", "Optimization", "Speed", "Other"]


# Without a slash, and not in the rows of the runs of tests/train/test_offline.py and
# test_online.py, which look up all that they find.
PLAIN = """
nll_loss critic/lr critic/grad_norm mfu eval_loss eval_perplexity eval_accuracy
eval_margin eval_kl eval_rewards/a eval_gold_reward eval_num_tokens eval_num_pairs
"""


def metric_names():
    """Metrics of the recipes, and the figures that their curves share."""
    train = Path(figures.__file__).parents[1] / "train"
    files = "objectives policy_objectives rollout ppo grpo updates step".split()
    yield from PLAIN.split()
    for file in files:
        for node in ast.walk(ast.parse((train / f"{file}.py").read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if re.fullmatch(r"[a-z_]+/[a-z_]+(/[a-z]+)?", node.value):
                    yield re.sub("/(chosen|rejected)$", "", node.value)


def test_every_metric_of_the_recipes_has_a_word_on_how_to_read_it():
    names = set(metric_names())
    assert {"objective/rlhf_reward", "clip_ratio/low_mean", "logps"} <= names
    assert not [n for n in names if not notes.note_of(n).sentence]


def test_sentences_are_of_the_right_metric():
    assert "chance" in notes.note_of("rewards/accuracies").sentence
    assert "chosen" in notes.note_of("rewards").sentence
    assert "before its weight" in notes.note_of("rewards/length/mean").sentence
    assert "a token" in notes.note_of("kl").sentence
    assert "a completion" in notes.note_of("eval_kl").sentence


def test_smoothing_keeps_lines_and_marks_noise():
    line = [2.0 * i for i in range(50)]
    assert drawing.smooth(line) == pytest.approx(line)
    assert not drawing.is_noisy(line) and drawing.is_noisy([0.0, 1.0] * 20)
    assert len(drawing.thin(range(100_000))) <= drawing.MAX_POINTS


def test_curves_of_training_come_first():
    rows = [{"step": 0, "eval_loss": 1.0}, {"step": 1, "loss": 1.0}]
    assert list(figures.curves_of(rows)) == ["loss", "eval_loss"]
