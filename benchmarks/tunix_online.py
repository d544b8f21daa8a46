"""GRPO and PPO with Tunix's learners, rollouts by its own sampler."""

import numpy as np
from transformers import AutoTokenizer
from tunix.rl import rl_cluster as cluster_lib, utils as rl_utils
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks import assets, measure, rewards, settings, tunix_model
from benchmarks.measure import Outcome


def grpo(model: str) -> Outcome:
    """A rollout of groups and one update, everything on one mesh."""
    ends, reward = clocked_reward()
    learner = GRPOLearner(
        make_cluster("grpo", model, critic=None),
        GRPOConfig(
            num_generations=settings.GROUP_SIZE,
            num_iterations=1,
            beta=settings.KL_COEF,
        ),
        reward_fns=[reward],
    )
    learner.train(question_batches(model, settings.ONLINE_PROMPTS))
    return online(ends)


def ppo(model: str) -> Outcome:
    """A rollout, then one update of policy and critic."""
    ends, reward = clocked_reward()
    # Its helper replaces an unembedding, which a tied model does not have: the critic
    # starts from the untied checkpoint, of the same shape.
    critic = rl_utils.create_critic_model(tunix_model.load(model, "chain", tied=False))
    learner = PPOLearner(
        make_cluster("ppo", model, critic=critic),
        PPOConfig(num_iterations=1, beta=settings.KL_COEF),
        reward_fns=[reward],
    )
    learner.train(question_batches(model, settings.QUESTIONS))
    return online(ends)


def clocked_reward():
    """(times of the calls, the reward): it is called once in every iteration."""
    ends: list[measure.Moment] = []

    def reward(prompts, completions, **_):
        ends.append(measure.now())
        return rewards.distinct(prompts, completions)

    return ends, reward


def online(ends: list[measure.Moment]) -> Outcome:
    """An iteration goes from reward to reward: an update, then the next rollout."""
    return measure.online(measure.spans(ends))


def question_batches(model: str, size: int):
    """The prompts in their order, one batch more than iterations are measured."""
    texts = assets.read_rows(model)["questions"]
    steps = settings.ONLINE_WARM + settings.ONLINE_TIMED + 1
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [{"prompts": np.array(parts[i % len(parts)])} for i in range(steps)]


def make_cluster(piece: str, model: str, critic) -> cluster_lib.RLCluster:
    """Policy, reference (and critic) beside each other, with the vanilla rollout."""
    mesh, role = tunix_model.make_mesh(), cluster_lib.Role
    roles = [role.ACTOR, role.REFERENCE, role.ROLLOUT] + [role.CRITIC] * bool(critic)
    steps = settings.ONLINE_WARM + settings.ONLINE_TIMED + 1
    config = cluster_lib.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine="vanilla",
        training_config=cluster_lib.RLTrainingConfig(
            actor_optimizer=tunix_model.optimizer(piece),
            critic_optimizer=tunix_model.optimizer(piece) if critic else None,
            **tunix_model.options() | {"max_steps": steps},
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=settings.ONLINE_NEW_TOKENS,
            max_prompt_length=settings.PROMPT_LENGTH,
            kv_cache_size=settings.PROMPT_LENGTH + settings.ONLINE_NEW_TOKENS,
            temperature=1.0,
            top_p=1.0,
        ),
    )
    return cluster_lib.RLCluster(
        actor=tunix_model.load(model, "model"),
        critic=critic,
        reference=tunix_model.load(model, "model"),
        tokenizer=AutoTokenizer.from_pretrained(assets.folder(model) / "model"),
        cluster_config=config,
    )
