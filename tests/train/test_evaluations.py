"""Held-out figures while training: what is kept, when a run ends, what is warned of."""

import itertools
import json
import os
import signal

import numpy as np
import pytest

from jalign.train import offline, online
from jalign.train.checkpoint import Checkpointer
from jalign.train.config import DPOConfig, RewardConfig, SFTConfig
from jalign.train.evaluations import (
    NO_CALLBACKS,
    Callbacks,
    Evaluation,
    Evaluations,
)
from jalign.train.inputs import params_digest
from jalign.train.online_config import PPOConfig
from tests.train import world
from tests.train.grpo_world import make_grpo_config
from tests.train.ppo_world import make_config, write_world

NO_LOOK = lambda params: Evaluation({}, [])  # noqa: E731
HERE = dict(model="m", data="d", out="o", eval_data="e")


def evaluated(config, series, **how):
    """Evaluations of [(step, figures)]."""
    found = Evaluations(lambda figures: Evaluation(figures, [str(figures)]), config)
    for step, figures in series:
        found.measure(step, figures)
    return found


def sft(**changes):
    return SFTConfig(**(HERE | {"eval_every": 2, "keep_best": "loss"} | changes))


def ppo(**changes):
    fields = {"reward": "gsm8k", "eval_reward": "gsm8k_format", "eval_every": 1}
    return PPOConfig(**(HERE | fields | changes))


def losses(*values, every=2):
    return [(every * i, {"loss": x}) for i, x in enumerate(values)]


def test_the_best_is_the_first_of_equals_and_never_the_start():
    found = evaluated(sft(), losses(0.1, 3.0, 2.0, 2.0, 2.5))
    assert found.kept == 4
    higher = evaluated(
        RewardConfig(**HERE, eval_every=1, keep_best="accuracy"),
        [(i, {"accuracy": x}) for i, x in enumerate([0.9, 0.5, 0.7, 0.6])],
    )
    assert higher.kept == 2
    assert evaluated(sft(keep_best=None), losses(1, 2)).kept is None


def test_patience_counts_measurements_since_the_best():
    assert evaluated(sft(patience=2), losses(4, 3, 3.5)).over is None
    over = evaluated(sft(patience=2), losses(4, 3, 3.5, 3.1)).over
    assert over and "no better held-out loss in 2" in over
    assert evaluated(sft(), losses(4, 3, 3.5, 3.1, 5)).over is None


def test_what_is_beyond_stop_kl_is_not_kept():
    rows = [
        (step, {"gold_reward": gold, "reward": 0.0, "kl": kl})
        for step, gold, kl in [(0, 0.0, 0.0), (1, 1.0, 2.0), (2, 2.0, 5.0)]
    ]
    assert evaluated(ppo(keep_best="gold_reward"), rows).kept == 2
    assert evaluated(ppo(keep_best="gold_reward", stop_kl=4.0), rows).kept == 1
    beyond = evaluated(ppo(keep_best="gold_reward", stop_kl=1.0), rows)
    assert beyond.kept is None and "beyond --stop-kl" in beyond.warnings(2)[0]


def test_one_rollout_beyond_stop_kl_ends_nothing_two_in_a_row_do():
    def after(*kls, record=None):
        found = Evaluations(NO_LOOK, ppo(stop_kl=8.0), record=record)
        for step, kl in enumerate(kls, 1):
            found.rollout(step, kl)
        return found

    assert after(9.0, 7.0, 9.0).ended is None
    assert "beyond stop_kl 8" in (after(1.0, 9.0, 8.5).ended or "")
    # A run that was killed in between goes on as it would have.
    assert after(8.5, record=after(9.0).record()).ended
    assert after(8.5, record=after(7.0).record()).ended is None
    unlimited = Evaluations(NO_LOOK, ppo())
    unlimited.rollout(1, 1e9)
    unlimited.rollout(2, 1e9)
    assert unlimited.ended is None


def test_a_model_that_ended_worse_is_warned_of():
    unkept = evaluated(sft(keep_best=None), losses(2.0, 1.0, 2.5))
    (text,) = unkept.warnings(4)
    assert "held-out loss 2 -> 2.5" in text and "best at step 2" in text
    assert unkept.warnings(2) == []
    (text,) = evaluated(sft(), losses(2.0, 3.0, 2.5)).warnings(4)
    assert "no measurement was better" in text


def test_a_reward_that_rises_while_the_other_falls_is_over_optimized():
    series = [(0, 0.0, 0.0), (1, 1.0, 1.0), (2, 2.0, 0.4)]
    rows = [(i, {"reward": r, "gold_reward": g}) for i, r, g in series]
    (text,) = evaluated(ppo(), rows).warnings(2)
    assert "over-optimized: from step 1 to 2 it rose from 1 to 2" in text
    assert evaluated(ppo(), rows).warnings(1) == []
    slightly = [*rows[:2], (2, {"reward": 2.0, "gold_reward": 0.95})]
    assert evaluated(ppo(), slightly).warnings(2) == []


def test_a_record_is_taken_up_unless_the_rows_have_changed(caplog):
    config, looked = sft(), []

    def look(figures):
        looked.append(figures)
        return Evaluation(figures, [])

    first = Evaluations(look, config, digest="a")
    for step, figures in losses(4, 3, 5):
        first.measure(step, figures)
    record = json.loads(json.dumps(first.record()))
    again = Evaluations(look, config, digest="a", record=record)
    assert again.kept == 2 and again.measure(4, {"loss": 0.0}) == {}
    assert len(looked) == 3
    other = Evaluations(look, config, digest="b", record=record)
    assert other.kept is None and "counts anew" in caplog.text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sft(eval_every=0), "eval_every must be >= 1"),
        (lambda: sft(eval_data=None), "eval_every needs held-out rows"),
        (lambda: sft(eval_every=None), "keep_best chooses .* eval_every"),
        (lambda: sft(keep_best=None, patience=1), "patience waits .* keep_best"),
        (lambda: sft(keep_best="los"), "'los' is not one of .* mean 'loss'"),
        (lambda: sft(keep_best="accuracy"), "not one of loss, perplexity"),
        (lambda: ppo(keep_best="gold_reward", eval_reward=None), "not one of reward"),
        (lambda: ppo(stop_kl=0.0), "stop_kl must be > 0"),
        (lambda: ppo(eval_data=None, eval_every=None), "eval_reward judges held-out"),
        (lambda: ppo(eval_reward="+"), "reward"),
    ],
)
def test_contradictions_name_their_flags(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_each_recipe_says_what_it_measures():
    assert DPOConfig(**HERE).watched == "accuracy"
    assert ppo().watched == "gold_reward" and ppo(eval_reward=None).watched == "reward"
    several = ppo(reward="gsm8k + 0.5*gsm8k_format", eval_reward=None)
    assert "rewards/gsm8k_format" in several.figures


def rows_of(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


GUARDS = ("--eval-every", "1", "--keep-best", "log_loss", "--schedule", "constant")


def guarded(folder, out, *flags):
    flags = ("--steps", "4", "--checkpoint-every", "0", *GUARDS, *flags)
    held_out = ("--eval-data", str(folder / "held" / "pairs.jsonl"))
    return world.run("reward", folder, out, *held_out, *flags)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = world.make(tmp_path_factory.mktemp("guards"))
    (folder / "held").mkdir()
    world.write_rows(folder / "held", 4, first=40)
    return folder


@pytest.fixture
def best_at_2(monkeypatch):
    """Weights -> a log loss of our choice, the same for the same weights."""
    real, left, known = offline.measure, iter([9.0, 3.0, 1.0, 2.0, 4.0]), {}

    def measure(fn, model, params, *args, **kwargs):
        figures = real(fn, model, params, *args, **kwargs)
        name = params_digest(params)
        if name not in known:
            known[name] = next(left)
        return figures | {"log_loss": known[name]}

    monkeypatch.setattr(offline, "measure", measure)


def test_the_best_checkpoint_is_exported_and_a_killed_run_finds_the_same(
    pairs, tmp_path, monkeypatch, capsys, best_at_2
):
    assert guarded(pairs, tmp_path / "whole") == 0
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (said["kept_step"], said["steps"]) == ("2", "4")
    assert (said["eval_log_loss_before"], said["eval_log_loss"]) == ("9", "1")
    found = {r["step"]: r.get("eval_log_loss") for r in rows_of(tmp_path / "whole")}
    assert found == {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    # A run of as many steps ends in the same weights, under a constant rate.
    assert guarded(pairs, tmp_path / "short", "--steps", "2") == 0
    one, other = (world.weights(tmp_path / name) for name in ("whole", "short"))
    assert all((one[name] == other[name]).all() for name in one)
    real, calls = offline.measure, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # before, and after steps 1 to 3
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(offline, "measure", killed)
        assert guarded(pairs, tmp_path / "cut") == 75
    assert guarded(pairs, tmp_path / "cut") == 0
    other = world.weights(tmp_path / "cut")
    assert all((one[name] == other[name]).all() for name in one)


def test_the_best_stays_protected_until_a_better_one_is_saved(
    pairs, tmp_path, monkeypatch, best_at_2
):
    real, seen = Checkpointer.save, []

    def save(self, step, *args):
        seen.append((step, self.protected))
        return real(self, step, *args)

    monkeypatch.setattr(Checkpointer, "save", save)
    assert guarded(pairs, tmp_path) == 0
    # Steps 1 and 2 are each the best so far; 4 is the last.
    assert seen == [(1, None), (2, 1), (4, 2)]
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_patience_ends_a_run_and_it_stays_ended(pairs, tmp_path, capsys):
    flags = ("--patience", "1", "--steps", "50", "--learning-rate", "0.3")
    assert guarded(pairs, tmp_path, *flags) == 0
    text = capsys.readouterr()
    assert "ended_early" in text.out and "training ends after step" in text.err
    steps = rows_of(tmp_path)[-1]["step"]
    assert steps < 50
    assert guarded(pairs, tmp_path, *flags) == 0
    assert rows_of(tmp_path)[-1]["step"] == steps


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("kl"))


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_stop_kl_ends_updates_and_run(method, prompts, tmp_path):
    make = {"ppo": make_config, "grpo": make_grpo_config}[method]
    run = getattr(online, f"run_{method}")
    steps, evals = [], []
    callbacks = Callbacks(
        lambda step, row: steps.append((step, row)),
        lambda step, figures: evals.append((step, figures)),
    )
    gold = prompts["reward"].rpartition(":")[0] + ":words"
    config = make(
        tmp_path, **prompts, steps=9, stop_kl=1e-3, eval_reward=gold, eval_every=1
    )
    summary = run(config, callbacks=callbacks)
    last = summary["iterations"]
    assert last < 9 and "beyond stop_kl 0.001" in summary["ended_early"]
    # The first rollout is the reference's own; two in a row were not learned from.
    assert abs(steps[0][1]["objective/kl"]) < 1e-4 and "loss" in steps[0][1]
    assert steps[-1][0] == last
    beyond = [row["objective/kl"] > 1e-3 for _, row in steps]
    assert [not far for far in beyond] == ["loss" in row for _, row in steps]
    in_a_row = [two == (True, True) for two in itertools.pairwise(beyond)]
    assert in_a_row.index(True) == len(in_a_row) - 1
    assert [step for step, _ in evals] == list(range(last + 1))
    assert all({"gold_reward", "kl"} <= figures.keys() for _, figures in evals)
    again = run(config, callbacks=NO_CALLBACKS)
    assert again["iterations"] == last
    np.testing.assert_allclose(again["eval_reward"], summary["eval_reward"])
