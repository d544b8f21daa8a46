"""Tests for jalign/train/online_eval.py."""

import numpy as np

from jalign.rewards import each_reward
from jalign.train.actors import make_actors
from jalign.train.online_eval import evaluate_prompts
from tests.train.grpo_world import make_group_cast, make_grpo_config
from tests.train.ppo_world import make_prompts


def lengths(prompts, completions, rows):
    return np.float32([len(text) for text in completions])


def test_figures_are_means_over_all_prompts_and_repeat():
    config = make_grpo_config()
    cast = make_group_cast()
    cast = cast._replace(
        reward=each_reward([cast.reward, lengths]),
        reward_weights={"a": 1.0, "length": 0.5},
    )
    # Without a reference nothing is asked of the policy but its completions.
    actors = make_actors(cast, config)._replace(policy=None)
    # More prompts than fit into one batch of completions.
    found = evaluate_prompts(actors, cast.policy_params, make_prompts(), config)
    figures = found.figures
    total = figures["rewards/a"] + 0.5 * figures["rewards/length"]
    np.testing.assert_allclose(figures["reward"], total, rtol=1e-5)
    assert "kl" not in figures and 0 < figures["completion_length"] <= 8
    assert len(found.texts) == 8
    again = evaluate_prompts(actors, cast.policy_params, make_prompts(), config)
    assert again == found
    assert evaluate_prompts(actors, None, [], config) == ({}, [])
