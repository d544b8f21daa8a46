"""What a policy does on held-out prompts."""

import numpy as np

from jalign.rewards import each_reward
from jalign.train.online_models import make_functions
from jalign.train.rollout import evaluate_prompts
from tests.train.grpo_world import make_group_models, make_grpo_config
from tests.train.ppo_world import make_prompts


def lengths(prompts, completions, rows):
    return np.float32([len(text) for text in completions])


def test_figures_are_means_over_all_prompts_and_repeat():
    config = make_grpo_config()
    models = make_group_models()
    models = models._replace(
        reward=each_reward([models.reward, lengths]),
        reward_weights={"a": 1.0, "length": 0.5},
    )
    # Without a reference nothing is asked of the policy but its completions.
    functions, score = make_functions(models, config), []

    def counted(*args):
        score.append(functions.score(*args))
        return score[-1]

    asked = functions._replace(score=counted)
    params = models.params["policy"]
    # More prompts than fit into one batch of completions.
    found = evaluate_prompts(asked, params, make_prompts(), config)
    figures = found.figures
    total = figures["rewards/a"] + 0.5 * figures["rewards/length"]
    np.testing.assert_allclose(figures["reward"], total, rtol=1e-5)
    assert "kl" not in figures and 0 < figures["completion_length"] <= 8
    assert len(found.texts) == 8
    again = evaluate_prompts(asked, params, make_prompts(), config)
    assert again == found
    assert score and not any(score)
    assert evaluate_prompts(functions, None, [], config) == ({}, [])
