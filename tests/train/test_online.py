"""Tests for jalign/train/online.py: whole runs on disk, interrupted and continued."""

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from jalign import models
from jalign.train import online, recipe, updates
from jalign.train.online_config import CriticConfig, KLConfig
from jalign.train.stop import Preempted
from tests.sharding import processes
from tests.train import tiny
from tests.train.grpo_world import make_grpo_config
from tests.train.ppo_world import make_config, share_of_a, write_world
from tests.train.test_stop import stop_in


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def config_of(world, out, **changes):
    kl = KLConfig(kl_target=1.0, kl_horizon=100)
    critic = CriticConfig(critic_learning_rate=3e-3, save_critic=True)
    fields = {"checkpoint_every": 1, "ppo": {"kl": kl, "critic": critic}}
    return make_config(out, **world, **(fields | changes))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An uninterrupted run: (OUT, summary)."""
    out = tmp_path_factory.mktemp("finished")
    return out, online.run_ppo(config_of(world, out))


def weights(out):
    _, policy = models.load(out / "model")
    _, critic = models.load(out / "critic")
    return jax.device_get((policy, critic))


def rows(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clocks = ("time", "step_time", "eps", "tokens_per_second", "mfu")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(clocks)}
        for line in lines
    ]


def assert_same_run(one, other):
    jax.tree.map(np.testing.assert_array_equal, weights(one), weights(other))
    assert rows(one) == rows(other)


def test_a_run_leaves_models_metrics_and_a_report(finished):
    out, summary = finished
    assert {"eval_reward", "eval_kl", "kl_coef", "iterations"} <= summary.keys()
    # k1 of a few completions: far from 0, of either sign.
    assert abs(summary["eval_kl_before"]) < 1e-4 < abs(summary["eval_kl"])
    assert [row["step"] for row in rows(out)] == [1, 2, 3]
    assert rows(out)[0]["val/ratio_first"] == pytest.approx(1.0, abs=1e-5)
    assert "PPO" in (out / "report.html").read_text(encoding="utf-8")
    assert not tiny.unexplained(out)
    policy, critic = models.load(out / "model")[0], models.load(out / "critic")[0]
    assert (policy.config.num_labels, critic.config.num_labels) == (0, 1)


def test_a_finished_run_trains_no_further(finished, world):
    out, summary = finished
    before = weights(out)
    again = online.run_ppo(config_of(world, out))
    jax.tree.map(np.testing.assert_array_equal, before, weights(out))
    assert again["kl_coef"] == summary["kl_coef"]
    assert again["eval_reward"] == pytest.approx(summary["eval_reward"])


def test_fewer_iterations_than_were_taken_are_refused(finished, world):
    with pytest.raises(ValueError, match="already taken 3 steps, not just 2"):
        online.run_ppo(config_of(world, finished[0], steps=2))


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def kill_at_call(monkeypatch, module, name, number):
    """The number-th call of module.name does not come back."""
    real, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (updates, "sample_and_score", 2),  # inside a rollout
        (updates, "local_rows", 6),  # inside the epochs of an update
        (online, "save_models", 1),  # after the last iteration
    ],
)
def test_a_killed_run_continues_to_identical_weights(
    module, name, number, finished, world, tmp_path, monkeypatch
):
    config = config_of(world, tmp_path)
    with monkeypatch.context() as patch:
        kill_at_call(patch, module, name, number)
        with pytest.raises(Killed):
            online.run_ppo(config)
    online.run_ppo(config)
    assert_same_run(finished[0], tmp_path)


def test_sigterm_saves_at_the_next_boundary(finished, world, tmp_path, monkeypatch):
    config = config_of(world, tmp_path, checkpoint_every=0)
    real = updates.update

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(updates, "update", interrupted)
        with pytest.raises(Preempted, match="step 1"):
            online.run_ppo(config)
    online.run_ppo(config)
    assert_same_run(finished[0], tmp_path)


def test_a_signal_outside_of_the_loop_loses_nothing(
    finished, world, tmp_path, monkeypatch
):
    names = "make_prompts", "evaluate_prompts", "save_models"
    phases = [*((online, name) for name in names), (recipe, "write_report")]
    for number, (module, name) in enumerate(phases):
        with monkeypatch.context() as patch:
            how = (signal.SIGTERM, signal.SIGINT)[number % 2]
            stop_in(patch, module, name, how=how)
            with pytest.raises(Preempted, match=f"stopped by {how.name}"):
                online.run_ppo(config_of(world, tmp_path))
        assert (tmp_path / "model").exists() == (name == "write_report")
    online.run_ppo(config_of(world, tmp_path))
    assert_same_run(finished[0], tmp_path)


def test_rewards_and_prompts_are_compared_by_what_they_hold(
    finished, world, tmp_path, monkeypatch
):
    """Everything is checked before a step is compiled, so these cost little."""
    folder, out = tmp_path / "moved", shutil.copytree(finished[0], tmp_path / "out")
    shutil.copytree(Path(world["model"]).parent, folder)
    moved = {
        "model": str(folder / "model"),
        "data": str(folder / "prompts.jsonl"),
        "reward": f"{folder / 'reward.py'}:share_of_a",
    }
    calls = []
    real = online.evaluate_prompts
    monkeypatch.setattr(
        online, "evaluate_prompts", lambda *a: calls.append(1) or real(*a)
    )
    summary = online.run_ppo(config_of(world | moved, out))
    assert summary["eval_reward"] == pytest.approx(finished[1]["eval_reward"])
    assert len(calls) == 1, "what was measured before is in the checkpoint"
    # Other held-out prompts are measured before as well as after.
    others = {"eval_data": str(folder / "prompts.jsonl")}
    online.run_ppo(config_of(world | moved | others, out))
    assert len(calls) == 3
    reward = folder / "reward.py"
    reward.write_text(reward.read_text() + "# changed\n")
    with pytest.raises(ValueError, match="[(]reward 1's file changed[)]"):
        online.run_ppo(config_of(world | moved, out))
    with pytest.raises(ValueError, match="reward was 1[*]share_of_a and is 2[*]share"):
        online.run_ppo(config_of(world | {"reward": f"2*{world['reward']}"}, out))
    rows = Path(world["data"]).read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(rows[::-1]))
    with pytest.raises(ValueError, match="the training rows changed"):
        online.run_ppo(config_of(world | {"data": moved["data"]}, out))


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("data", "nowhere.jsonl", "nowhere.jsonl"),
        ("eval_data", "nowhere.jsonl", "nowhere.jsonl"),
        ("reward", "nowhere.py:f", "nowhere.py"),
        ("reward", "MODEL", "no reward model"),
        ("reward", "gsm8k + nowhere", "reward 'nowhere' is not"),
        ("reward", "./nowhere/model", "'./nowhere/model' is not"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    field, value, match, world, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", None)
    value = value.replace("MODEL", world["model"])
    with pytest.raises((ValueError, OSError), match=match):
        online.run_ppo(config_of(world | {field: value}, tmp_path))


def test_other_settings_do_not_continue_a_run(finished, world):
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        online.run_ppo(config_of(world, finished[0], seed=1))


def test_prompts_that_leave_no_room_are_dropped_by_name(world, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "a b c d e f g h i"}) + "\n")
    config = config_of(world | {"data": str(path)}, tmp_path / "out")
    with pytest.raises(ValueError, match="max_prompt_length=8"):
        online.run_ppo(config)


def test_a_failing_reward_names_itself(world, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def nan(p, c, r):\n    return [float('nan')] * len(p)\n")
    config = config_of(world | {"reward": f"{bad}:nan"}, tmp_path / "out")
    with pytest.raises(ValueError, match="nan for row 0"):
        online.run_ppo(config)


def test_a_run_with_one_trunk_is_saved_as_two_models_and_continues(
    world, tmp_path, monkeypatch
):
    options = {"critic": CriticConfig(shared_trunk=True, save_critic=True)}
    outs = tmp_path / "whole", tmp_path / "killed"
    for out in outs:
        config = config_of(world, out, ppo=options, steps=2)
        if out is outs[1]:
            with monkeypatch.context() as patch:
                kill_at_call(patch, updates, "sample_and_score", 2)
                with pytest.raises(Killed):
                    online.run_ppo(config)
        summary = online.run_ppo(config)
        assert summary["iterations"] == 2
    assert_same_run(*outs)
    policy, critic = weights(outs[0])
    assert "score" not in policy and "score" in critic
    jax.tree.map(np.testing.assert_array_equal, policy["layers"], critic["layers"])


def grpo_config_of(world, out, **changes):
    file = world["reward"].rpartition(":")[0]
    length = f"(mean({file}:words, {file}:tokens) - 0.5*std)"
    reward = f"{world['reward']} + -0.01*{length}"
    return make_grpo_config(out, **(world | {"reward": reward} | changes))


@pytest.fixture(scope="module")
def finished_groups(world, tmp_path_factory):
    """An uninterrupted GRPO run: (OUT, summary)."""
    out = tmp_path_factory.mktemp("groups")
    return out, online.run_grpo(grpo_config_of(world, out))


def test_a_grpo_run_leaves_a_model_metrics_and_a_report(finished_groups):
    out, summary = finished_groups
    assert {"eval_reward", "iterations", "eval_rewards/words"} <= summary.keys()
    assert not tiny.unexplained(out)
    assert {"eval_rewards/mean", "eval_rewards/mean/member_std"} <= summary.keys()
    assert not {"eval_kl", "kl_coef"} & summary.keys()
    found = rows(out)
    assert [row["step"] for row in found] == [1, 2, 3]
    assert found[0]["ratio_first"] == pytest.approx(1.0, abs=1e-5)
    part = {k[8:-5]: x for k, x in found[0].items() if k.startswith("rewards/")}
    total = part["share_of_a"] - 0.01 * part["mean"]
    assert found[0]["reward"] == pytest.approx(total, abs=1e-6)
    # `tokens`, of TRL's form, counts the one that ends a completion, too.
    assert part["words"] <= part["tokens"] == found[0]["completions/mean_length"]
    less = 0.5 * part["mean/member_std"]
    length = (part["words"] + part["tokens"]) / 2 - less
    assert part["mean"] == pytest.approx(length, abs=1e-5)
    assert "GRPO" in (out / "report.html").read_text(encoding="utf-8")
    assert models.load(out / "model")[0].config.num_labels == 0
    assert not (out / "critic").exists()


@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (updates, "sample_and_score", 3),  # inside a rollout
        (updates, "local_rows", 4),  # inside the epochs of an update
    ],
)
def test_a_killed_grpo_run_continues_to_identical_weights(
    module, name, number, finished_groups, world, tmp_path, monkeypatch
):
    config = grpo_config_of(world, tmp_path, checkpoint_every=1)
    with monkeypatch.context() as patch:
        kill_at_call(patch, module, name, number)
        with pytest.raises(Killed):
            online.run_grpo(config)
    online.run_grpo(config)
    jax.tree.map(
        np.testing.assert_array_equal,
        *(models.load(out / "model")[1] for out in (finished_groups[0], tmp_path)),
    )
    assert rows(finished_groups[0]) == rows(tmp_path)


def test_rows_and_functions_in_memory_make_the_same_run(
    finished_groups, world, tmp_path, caplog
):
    """What the files give, bit for bit, and by content the same to a checkpoint."""
    file = world["reward"].rpartition(":")[0]
    names = ("data", "eval_data")
    given: dict = {
        name: [json.loads(line) for line in Path(world[name]).read_text().splitlines()]
        for name in names
    }
    length = f"(mean({file}:words, {file}:tokens) - 0.5*std)"
    given |= dict(model=world["model"], out=str(tmp_path), mesh="fsdp=1", steps=3)
    given |= dict(learning_rate=3e-3, schedule="constant", batch_size=4, max_length=16)
    given |= dict(group_size=4, num_epochs=2, max_new_tokens=8)
    given["reward"] = [share_of_a, (-0.01, length)]
    summary = online.run_grpo(**given)
    assert (
        "10 of 10 held-out rows are training rows (eval_data row 1 ...)" in caplog.text
    )
    assert {**summary, "model": ""} == {**finished_groups[1], "model": ""}
    jax.tree.map(
        np.testing.assert_array_equal,
        *(models.load(out / "model")[1] for out in (finished_groups[0], tmp_path)),
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "24 rows in memory" in page and "share_of_a (in Python)" in page
    assert given["data"][-1]["prompt"] not in page
    assert online.run_grpo(**given) == summary
    changed = given | {
        "reward": [lambda *batch: share_of_a(*batch), given["reward"][1]]
    }
    with pytest.raises(
        ValueError, match="the reward was 1.share_of_a .* and is 1.lambda"
    ):
        online.run_grpo(**changed)

    def share_of(prompts, completions, rows):
        return [text.split().count("b") / 8 for text in completions]

    share_of.__name__ = "share_of_a"
    with pytest.raises(ValueError, match="reward 1's function changed"):
        online.run_grpo(**(given | {"reward": [share_of, given["reward"][1]]}))
    with pytest.raises(ValueError, match="the training rows changed"):
        online.run_grpo(**(given | {"data": given["data"][:-1]}))


def test_grpo_does_not_continue_a_ppo_run(finished, world):
    with pytest.raises(ValueError, match="kind was 'ppo' and is 'grpo'"):
        online.run_grpo(make_grpo_config(finished[0], **world))


def two_process_body():
    import json
    import os
    from pathlib import Path

    from jalign.train import online
    from tests.train.ppo_world import make_config
    from tests.train.test_online import grpo_config_of

    out, world = Path(os.environ["PPO_OUT"]), json.loads(os.environ["PPO_WORLD"])
    both = {"mesh": "fsdp=2", "steps": 2}
    return (
        online.run_ppo(make_config(out / "ppo", **(world | both))),
        online.run_grpo(grpo_config_of(world, out / "grpo", **both)),
    )


def test_two_processes_learn_from_the_rewards_of_process_0(
    finished, finished_groups, world, tmp_path, monkeypatch
):
    monkeypatch.setenv("PPO_OUT", str(tmp_path))
    monkeypatch.setenv("PPO_WORLD", json.dumps(world))
    one, two = processes.run(two_process_body, devices=1)
    assert one == two and all(summary["iterations"] == 2 for summary in one)
    for kind, (out, _) in (("ppo", finished), ("grpo", finished_groups)):
        alone = rows(out)[0]
        for name, value in rows(tmp_path / kind)[0].items():
            assert value == pytest.approx(alone[name], abs=1e-3), (kind, name)
