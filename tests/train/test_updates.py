"""Tests for jalign/train/updates.py."""

import time

import numpy as np
import pytest

from jalign.train.ppo import PPO
from jalign.train.updates import (
    loop_metrics,
    minibatches,
    over_updates,
    rollout_prompts,
)
from jalign.types import Rollout
from tests.train.grpo_world import make_grpo_config
from tests.train.ppo_world import make_prompts


def rows_as_rollout(rows):
    x = np.arange(rows)[:, None]
    return Rollout(x, x, x, x, x, None, None, x, None)


HALVES = make_grpo_config(grpo={"num_minibatches": 2})


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own():
    config = HALVES
    parts = [p.tokens[:, 0] for p in minibatches(rows_as_rollout(16), config, 5)]
    assert [len(part) for part in parts] == [8] * 4
    epochs = np.concatenate(parts).reshape(2, 16)
    np.testing.assert_array_equal(np.sort(epochs), [range(16)] * 2)
    assert (epochs[0] != epochs[1]).any()
    again = [p.tokens[:, 0] for p in minibatches(rows_as_rollout(16), config, 5)]
    np.testing.assert_array_equal(parts, again)
    other = [p.tokens[:, 0] for p in minibatches(rows_as_rollout(16), config, 6)]
    assert (np.array(parts) != np.array(other)).any()
    assert config.options.updates_per_rollout == 4


def test_the_iteration_picks_prompts_and_key():
    config, prompts = make_grpo_config(), make_prompts()
    first, key = rollout_prompts(prompts, config, 0)
    second, other = rollout_prompts(prompts, config, 1)
    assert len(first) == 4 and key != other
    assert not {p.text for p in first} & {p.text for p in second}


def test_metrics_of_updates_and_of_the_loop():
    common = {"val/ratio": 1.0, "learning_rate": 0.1, "skipped": 1.0}
    rows = [{"loss": np.float32(x)} | common for x in (1, 3)]
    found = over_updates(rows, PPO)
    assert found["loss"] == 2.0 and found["skipped"] == 2.0
    now = time.perf_counter()
    row = loop_metrics(rows_as_rollout(16), make_grpo_config(), 1, now - 2, now - 1)
    assert row["num_tokens"] == 15 and row["episode"] == 32
    assert row["time/rollout"] == pytest.approx(1)
    assert row["eps"] == pytest.approx(8, rel=0.1)
